"""The commands ``smidgen zoo build | status | import | evaluate | plan``; their flags are these functions' signatures."""

from pathlib import Path
from typing import Annotated, Any, Literal

from smidgen.cli.build import Section


def build(
    settings: Annotated[Any, Section("difflora.zoo.settings:ZooConfig", "difflora.zoo.settings")],
    workers: int = 1,
    ray: str | None = None,
) -> None:
    """Train a zoo: an adapter for each of many people, many at once on one frozen base. Run it again to go on.

    Args:
        settings: all that decides the zoo.
        workers: processes on this machine (with --ray: groups that run at once).
        ray: address of a Ray cluster, or local.
    """
    from smidgen.difflora.zoo.build import build as run

    print(run(settings, workers, ray))


def evaluate(
    zoo: Path,
    /,
    settings: Annotated[Any, Section("lab.audit.settings:EvaluateConfig", "lab.audit.settings", append=True)],
) -> None:
    """Judge generators on the held-out people of ZOO, beside everything simpler. Run it again to go on.

    Args:
        zoo: the zoo's folder.
        settings: what is judged, on whom, and how.
    """
    from smidgen.lab.audit.evaluate import evaluate as run

    print(run(zoo, settings))


def status(zoo: Path, /, verify: bool = False) -> None:
    """Say how ZOO stands: done, rejected with reasons, missing, bytes, seconds an adapter.

    Args:
        zoo: the zoo's folder.
        verify: also read every row and check it against its hash.
    """
    from smidgen.difflora.zoo.status import status as run
    from smidgen.difflora.zoo.store import Zoo

    print(run(zoo))
    if verify:
        print(f"  {Zoo(zoo).verify():,} rows read and found as they were written")


def import_(
    folder: Path,
    /,
    out: Path = Path("zoo"),
    base: str = "embedded",
    rank: int | None = None,
    held_out_share: float = 0.1,
    ignore_text_encoder: bool = False,
) -> None:
    """Make a zoo of the LoRA files below FOLDER: peft folders, diffusers and kohya files.

    Args:
        folder: adapters; the first folder's name below it is the person's.
        out: where the zoo goes.
        base: embedded, a pipeline folder, or a hub name; the one they were trained on.
        rank: bring all to this rank by SVD (none: all must have the same).
        held_out_share: share of people kept for tests.
        ignore_text_encoder: leave out what changes the text encoder.
    """
    from smidgen.difflora.zoo.importing import import_zoo as run

    print(run(folder, out, base, rank, held_out_share, ignore_text_encoder))


def plan(
    assumed: Annotated[Any, Section("lab.planning.plan:Assumptions")],
    base: Literal["sdxl", "sd15"] = "sdxl",
    json: bool = False,
) -> None:
    """Say what a zoo and a generator would cost: operations, hours, memory and disk, counted on the meta device.

    Args:
        assumed: what is chosen, not counted.
        base: sdxl at 1024 pixels, or sd15 at 512.
        json: print everything as JSON.
    """
    from smidgen.lab.planning.plan import make_plan
    from smidgen.lab.planning.telling import to_json, to_markdown

    print((to_json if json else to_markdown)(make_plan(base, assumed)))
