"""What the page does with people and pictures, without the page: predict, train, draw, edit, blend, and files for other programs.

One base is kept in memory and one call at a time uses it.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from smidgen.adapters.atomic import new_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, public_name
from smidgen.adapters.combine import combine
from smidgen.adapters.components import component_folders
from smidgen.adapters.export import size
from smidgen.bases.embedded import EMBEDDED
from smidgen.bases.embedded.worlds import WORLD_OF
from smidgen.bases.families import load_base, located
from smidgen.bases.origin import IMAGES, read_origin
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase
from smidgen.difflora.generator.directions import load_directions
from smidgen.difflora.generator.generator import SHIPPED_FOR, load_generator, shipped
from smidgen.difflora.use.commands import blend as blend_command
from smidgen.difflora.use.commands import edit as edit_command
from smidgen.difflora.use.commands import predict as predict_command
from smidgen.difflora.use.sampler import Output, Result, Sheet
from smidgen.difflora.use.sources import base_of
from smidgen.errors import ConfigError, SmidgenError
from smidgen.serving.page import runs
from smidgen.serving.page.pictures import Finding, keep
from smidgen.serving.page.runs import Run
from smidgen.tasks.control import hint
from smidgen.tasks.drawing import generate
from smidgen.tasks.exporting import export_folder
from smidgen.tasks.going_on import starting
from smidgen.tasks.personalize.plan import make_plan
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
from smidgen.tasks.personalize.subjects import read_subjects
from smidgen.training.loop import LoopConfig
from smidgen.training.settings import load_yaml

FORMATS = {
    "Smidgen": "",
    "diffusers": "diffusers",
    "ComfyUI": "kohya",
}  # what a download is for -> the name of its format
RECIPE = "recipe.json"
MOST = 16  # pictures at once


class Bases:
    """The base that draws, kept between calls; another one takes its place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str | None], ImageBase] | None = None

    @contextmanager
    def using(self, name: str, config: str | None = None) -> Iterator[ImageBase]:
        """The base called ``name``, for this caller alone."""
        with self._lock:
            if self._known is None or self._known[0] != (name, config):
                self._known = None
                self._known = (name, config), load_base(name, "no", default_device(), config=config)
            yield self._known[1]


@dataclass(frozen=True)
class Wanted:
    """What a training is asked for on the page."""

    title: str
    kind: str = "person"  # what it is one of
    word: str = ""  # of its own, in prompts
    method: str = "svfit"
    steps: int = 250
    base: str = "embedded"
    prompts: tuple[str, ...] = ()  # to draw while it trains, and at its end
    start: Path | None = None  # an adapter to go on from
    learning_rate: float | None = None  # None: the method's own

    def config(self) -> PersonalizeConfig:
        """As ``smidgen personalize`` takes it.

        Raises:
            ConfigError: a setting without meaning.
        """
        data = Data(instance_prompt=self.prompt, class_word=self.noun, placeholder_token=self.word.strip() or None)
        loop = LoopConfig(**_rhythm(self.steps))
        shown = Show(validation_prompt=self.prompts, num_prompts=4, num_seeds=1, compare_lora=False)
        adapter = Adapter(self.method, learning_rate=self.learning_rate)
        config = PersonalizeConfig(data, adapter, loop, shown, base=self.base.strip())
        return config if self.start is None else replace(starting(config, self.start), from_adapter=self.start)

    @property
    def noun(self) -> str:
        return self.kind.strip() or "person"

    @property
    def prompt(self) -> str:
        """The caption of pictures that have none, as the base's captions are."""
        return f"a portrait of a {self.noun}"


def train(folder: Path, wanted: Wanted, found: Sequence[Finding]) -> Run:
    """Keep the pictures and start to train on them.

    Raises:
        SmidgenError: pictures that cannot be trained on, settings without meaning, another run at work. Nothing is left then.
    """
    if not any(one.used for one in found):
        raise ConfigError("Drop pictures first: five to twenty of one subject are good.")
    located(wanted.base.strip())
    about = f"from {wanted.start.name}" if wanted.start else ""
    return _start(folder, wanted.title, wanted.config(), about, lambda place: keep(found, place))


def train_on(folder: Path, run: Run, steps: int) -> Run:
    """Go on from a finished run's adapter with the same pictures and settings, in a folder of its own."""
    if not run.finished:
        raise ConfigError(f"{run.title} has no finished adapter to continue from; resume it instead.")
    if run not in trainable(folder):
        raise ConfigError(
            f"{run.title} was made by peft, which training does not go on from; drop pictures under Make and train."
        )
    if not run.pictures.is_dir():
        raise ConfigError(
            f"The pictures of {run.title} are not kept here; drop pictures under Make and start from it there."
        )
    title = f"{run.title}, continued"
    settings = [run.folder / name for name in (runs.SETTINGS, "config.yaml")]
    config = next((load_yaml(PersonalizeConfig, path) for path in settings if path.is_file()), Wanted(title).config())
    loop = replace(config.train, **_rhythm(steps))
    config = replace(starting(replace(config, train=loop), run.folder), from_adapter=run.folder)
    return _start(folder, title, config, f"from {run.title}", lambda place: shutil.copytree(run.pictures, place))


def _start(folder: Path, title: str, config: PersonalizeConfig, about: str, fill: Callable[[Path], Any]) -> Run:
    """A new run whose pictures ``fill`` puts in place; nothing is left of one that is refused."""
    path = runs.new_run(folder, title)
    try:
        fill(path / "pictures")
        config = replace(config, data=replace(config.data, folder=path / "pictures"))
        read_subjects(config.data, resolution=64, step=8)  # refuses what the child would, whatever the size
        return runs.start(folder, path, "personalize", title, config, about)
    except BaseException:
        runs.discard(path)
        raise


def _rhythm(steps: int, previews: int = 5) -> dict[str, Any]:
    """Settings of the loop for so many steps: some previews, a checkpoint at each."""
    every = max(1, steps // previews)
    return {
        "max_train_steps": steps, "lr_warmup_steps": min(10, steps), "preview_steps": every, "checkpointing_steps": min(50, every),
    }  # fmt: skip


def predict(folder: Path, title: str, found: Sequence[Finding], base: str = EMBEDDED) -> tuple[Run, Result]:
    """The adapter of the person in the pictures, without training, and what the prediction says of itself."""
    if base not in SHIPPED_FOR:
        raise ConfigError(
            f"Nobody has learnt to predict adapters for {base!r}: choose the base {' or '.join(SHIPPED_FOR)}, or train."
        )
    if not any(one.used for one in found):
        raise ConfigError("Drop a picture first: one photo of a person is enough.")
    path = runs.new_run(folder, title)
    try:
        photos = keep(found, path / "pictures")
        made = predict_command(photos, replace(_output(path), base=base), progress=False)
        about = f"from {len(photos)} pictures" if len(photos) > 1 else "from one picture"
        return runs.note(path, "predict", title, about), made
    except BaseException:
        runs.discard(path)
        raise


def edit(source: Run, out: Path, wanted: Mapping[str, float]) -> Path:
    """The adapter of ``source`` with each slider at its value, in the folder ``out``."""
    chosen = {name: value for name, value in wanted.items() if name and value}
    if not chosen:
        raise ConfigError("Nothing is to change: choose an attribute, and move its slider away from 0.")
    edit_command([source.folder], _output(out), chosen)
    return out


@dataclass(frozen=True)
class Blend:
    """Two adapters mixed: adapters with the weight of each, and a sentence on what they are."""

    parts: Mapping[Path, float]
    words: str

    @property
    def folder(self) -> Path | None:
        """The one adapter that the mixture is, which can be kept; None for two that only draw together."""
        return next(iter(self.parts)) if len(self.parts) == 1 else None


def blend(first: Run, second: Run, out: Path, share: float) -> Blend:
    """Two adapters of one base, of the second the given share. Predicted people: the person between the two; others: their sum at
    these weights, one adapter in the folder ``out`` where there is an exact one.

    Raises:
        SmidgenError: they are the same, or of two bases.
    """
    if first.folder == second.folder:
        raise ConfigError("Choose two different ones to blend.")
    origin, other = (read_origin(run.folder) for run in (first, second))
    if origin.base != other.base:
        raise ConfigError(
            f"{first.title} is for {origin.base}, and {second.title} for {other.base}: adapters of one base add up."
        )
    if all((run.folder / RECIPE).is_file() for run in (first, second)):
        blend_command(first.folder, second.folder, _output(out), share)
        return Blend({out: 1.0}, "The person between the two.")
    weights = {first.folder: round(1 - share, 6), second.folder: share}
    try:
        combine(list(weights), list(weights.values()), out=out)
    except SmidgenError:
        return Blend(weights, "Both at once; adapters that differ in method, rank or layers make no one file.")
    (out / "report.json").write_text(json.dumps({"kind": IMAGES, "base": public_name(origin.base)}))
    return Blend({out: 1.0}, "Both at once, in one adapter.")


def keep_try(folder: Path, out: Path | None, kind: str, title: str, about: str) -> Run:
    """Keep what was tried, as a run."""
    if out is None or not (out / CONFIG_NAME).is_file():
        raise ConfigError("There is nothing to keep yet: try it first.")
    path = runs.new_run(folder, title)
    shutil.copytree(out, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("drawn"))
    return runs.note(path, kind, title, about)


def check_prompts(prompts: Sequence[str], each: int = 1) -> list[str]:
    """The prompts that say something.

    Raises:
        ConfigError: none does, or more pictures are asked for than are drawn at once.
    """
    asked = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not asked:
        raise ConfigError("Say what to draw: one prompt a line, such as 'a portrait of a person, smiling'.")
    if len(asked) * each > MOST:
        raise ConfigError(f"{len(asked) * each} pictures at once are too many; {MOST} is the most.")
    return asked


def draw(
    bases: Bases,
    adapter: Path | Mapping[Path, float],
    weight: float,
    prompts: Sequence[str],
    seed: int = 0,
    each: int = 1,
) -> list[tuple[Path, str]]:
    """Pictures of each prompt with an adapter, or several with weights of their own, at a weight; kept below the first one's
    folder, with their prompts."""
    asked = check_prompts(prompts, each)
    parts = adapter if isinstance(adapter, Mapping) else {adapter: 1.0}
    adapter = next(iter(parts))
    origin = read_origin(adapter)
    with bases.using(origin.named(), origin.base_config) as base:
        paths = generate(
            list(parts), asked, out=adapter / "drawn" / uuid.uuid4().hex[:12], num_images=each, seed=seed, strength=weight, loaded=base,
            weights=list(parts.values()),
        )  # fmt: skip
    return list(zip(paths, [prompt for prompt in asked for _ in range(each)], strict=True))


def scenes(bases: Bases, adapter: Path, count: int = 4) -> list[str]:
    """Prompts that suit the adapter's base."""
    origin = read_origin(adapter)
    with bases.using(origin.named(), origin.base_config) as base:
        return list(base.scenes(count, 0))


def download(run: Run, wanted: str) -> tuple[Path, str]:
    """A file of the adapter for another program (``FORMATS``), and what is to be said of it."""
    if wanted not in FORMATS:
        raise ConfigError(f"Choose what the file is for: {', '.join(FORMATS)}.")
    if not run.finished:
        raise ConfigError(f"{run.title} is not finished, so there is no file of it yet.")
    folder = run.folder / "downloads"
    if not FORMATS[wanted]:
        return _zipped(run, folder / f"{run.name}.zip")
    out = folder / FORMATS[wanted] / run.name
    shutil.rmtree(out, ignore_errors=True)
    words = export_folder(run.folder, FORMATS[wanted], out)[1]
    return next(out.glob("*.safetensors")), words.replace(f"{out}: ", "").replace(str(run.folder), run.title)


def trainable(folder: Path) -> list[Run]:
    """Runs that a training can go on from: trained and predicted ones, not what peft itself made."""
    return [run for run in drawable(folder) if not read_origin(run.folder).method.startswith("peft:")]


def people(folder: Path) -> list[Run]:
    """Runs that a generator made, which can be edited."""
    return [run for run in drawable(folder) if (run.folder / RECIPE).is_file()]


def drawable(folder: Path) -> list[Run]:
    """Finished runs that draw, without those that follow control pictures."""
    found = []
    for run in runs.list_runs(folder):
        if run.finished:
            try:
                if read_origin(run.folder).task == IMAGES and hint.read_config(run.folder) is None:
                    found.append(run)
            except SmidgenError:
                continue
    return found


def sliders(person: Run | None) -> list[str]:
    """What a predicted person can be moved along, as ``skin=dark``; None: one of the embedded base."""
    return _sliders(shipped(base_of(person.folder) if person else None))


@cache
def _sliders(generator: Path) -> list[str]:
    return [direction.name for direction in load_directions(generator, load_generator(generator)).directions]


def example(folder: Path, seed: int, base: str = EMBEDDED) -> list[Path]:
    """Pictures of an invented person of the world that ``base`` draws, to try the page with.

    Raises:
        MissingExtraError: what draws them is not installed.
    """
    from smidgen.tasks.drawing import draw_subject

    draw_subject(folder, seed, 8, WORLD_OF.get(base, WORLD_OF[EMBEDDED]))
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jsonl"))


def _output(out: Path) -> Output:
    return Output(out, overwrite=True, sheet=Sheet(sheet=False))


def _zipped(run: Run, path: Path) -> tuple[Path, str]:
    """The adapter's folder as one archive: what loads, and what is said of it."""
    names = (CONFIG_NAME, WEIGHTS_NAME, "README.md", RECIPE, "report.json", "contact_sheet.png")
    with new_file(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in (run.folder, *component_folders(run.folder)):
            for name in names:
                if (part / name).is_file():
                    archive.write(part / name, Path(run.name) / part.relative_to(run.folder) / name)
    return path, f"The whole folder, {size(path.stat().st_size)}. Unpack it, then smidgen.load(pipe, {run.name!r})."


def plan_rows(wanted: Wanted) -> list[tuple[str, str]]:
    """What a training would need, in words; nothing is tried, so that it is said at once."""
    found = make_plan(wanted.config(), measured=False)
    place = "of a card's memory" if found.card else "of memory, beside the program's own"
    rows = [
        ("Memory", f"{size(int(found.peak))} {place}"),
        ("Trained parameters", f"{found.trained:,} of {found.parameters:,}"),
        ("On the disk", size(int(sum(value for name, value in found.disk.items() if "base" not in name)))),
        ("Pictures", f"{found.resolution} x {found.resolution} pixels"),
    ]
    if found.card:
        times = ", ".join(f"{name} {value:.2g} s" for name, value in found.counted_seconds().items())
        rows.append(("A step, counted", times))
    return rows
