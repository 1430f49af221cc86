"""The commands ``smidgen zoo build | status | import | evaluate | plan``; their flags are these functions' signatures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from smidgen.cli.flags import value_of
from smidgen.errors import ConfigError, did_you_mean

SUMMARY = {
    "build": "train an adapter for each of many people, many at once",
    "status": "say how a zoo stands",
    "import": "make a zoo of LoRA files",
    "evaluate": "judge a generator on held-out people, beside everything simpler",
    "plan": "say what a generator for SDXL or SD 1.5 would cost",
}


def overview() -> str:
    """The commands, one a line."""
    lines = [f"  {name.ljust(8)}  {text}" for name, text in SUMMARY.items()]
    return "usage: smidgen zoo COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nsmidgen zoo COMMAND --help says more."


def find(name: str, words: Sequence[str]) -> Callable[..., None]:
    """The command called ``name``; ConfigError with the nearest names otherwise."""
    if name not in SUMMARY:
        raise ConfigError(
            f"There is no command 'zoo {name}'.{did_you_mean(name, SUMMARY)} Known: {', '.join(SUMMARY)}."
        )
    if name == "build":
        return build_command(words)
    if name == "evaluate":
        return evaluate_command(words)
    if name == "plan":
        return plan_command()
    return status if name == "status" else import_


def build_command(words: Sequence[str]) -> Callable[..., None]:
    """The command with the defaults that ``--preset`` among ``words`` names."""
    import tyro

    from smidgen.difflora.zoo.settings import PRESETS, ZooConfig

    named = value_of(words, "--preset") or "default"
    if named not in PRESETS:
        raise ConfigError(f"There is no preset {named!r}.{did_you_mean(named, PRESETS)} Known: {', '.join(PRESETS)}.")

    def build(settings: Any = PRESETS[named], workers: int = 1, ray: str | None = None, preset: Any = named) -> None:
        """Train a zoo: an adapter for each of many people, many at once on one frozen base. Run it again to go on.

        Args:
            settings: all that decides the zoo.
            workers: processes on this machine (with --ray: groups that run at once).
            ray: address of a Ray cluster, or local.
            preset: settings to start from.
        """
        from smidgen.difflora.zoo.build import build as run

        print(run(settings, workers, ray))

    build.__annotations__["settings"] = Annotated[ZooConfig, tyro.conf.arg(name="")]
    build.__annotations__["preset"] = Literal[tuple(PRESETS)]
    return build


def evaluate_command(words: Sequence[str]) -> Callable[..., None]:
    """The command with the defaults that ``--preset`` among ``words`` names."""
    from tyro import conf

    from smidgen.lab.audit.settings import PRESETS, EvaluateConfig

    named = value_of(words, "--preset") or "default"
    if named not in PRESETS:
        raise ConfigError(f"There is no preset {named!r}.{did_you_mean(named, PRESETS)} Known: {', '.join(PRESETS)}.")

    def evaluate(zoo: Path, /, settings: Any = PRESETS[named], preset: Any = named) -> None:
        """Judge generators on the held-out people of ZOO, beside everything simpler. Run it again to go on.

        Args:
            zoo: the zoo's folder.
            settings: what is judged, on whom, and how.
            preset: settings to start from.
        """
        from smidgen.lab.audit.evaluate import evaluate as run

        print(run(zoo, settings))

    evaluate.__annotations__["settings"] = Annotated[EvaluateConfig, conf.arg(name=""), conf.UseAppendAction]
    evaluate.__annotations__["preset"] = Literal[tuple(PRESETS)]
    return evaluate


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


def plan_command() -> Callable[..., None]:
    """The command with the plan's own assumptions as flags."""
    import tyro

    from smidgen.lab.planning.plan import Assumptions

    def plan(base: Literal["sdxl", "sd15"] = "sdxl", assumed: Any = Assumptions(), json: bool = False) -> None:  # noqa: B008
        """Say what a zoo and a generator would cost: operations, hours, memory and disk, counted on the meta device.

        Args:
            base: sdxl at 1024 pixels, or sd15 at 512.
            assumed: what is chosen, not counted.
            json: print everything as JSON.
        """
        from smidgen.lab.planning.plan import make_plan
        from smidgen.lab.planning.telling import to_json, to_markdown

        print((to_json if json else to_markdown)(make_plan(base, assumed)))

    plan.__annotations__["assumed"] = Annotated[Assumptions, tyro.conf.arg(name="")]
    return plan
