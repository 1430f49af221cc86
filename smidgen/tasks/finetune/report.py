"""What a fine-tuning says at its end: a table, report.json, and a model card that others can load from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.tuner.coverage import Coverage
from smidgen.bases.transformers import AUTO
from smidgen.tasks.cards import adapter_head, bullets, covered, licence, model_card, table
from smidgen.tasks.finetune.settings import FULL, PROBE
from smidgen.training.metrics import MULTI

PIPELINES = {"instruction": "text-generation"}  # the hub's name of a task where it is not the recipe's


@dataclass(frozen=True)
class FinetuneReport:
    """The result of one fine-tuning in the folder ``adapter``.

    ``scores`` are ``base`` (untouched, its head fresh, on the test split), ``test`` (the saved file, on the test split)
    and ``validation``; of classifiers ``majority`` too (always the commonest answer of train, on the test split) and ``head`` (the
    best head on the frozen base, on the test split). ``headline`` is what has to be said first.
    ``problem`` is a classifier's kind in transformers' terms. Numbers and bytes of the head are counted apart from the adapter's.
    """

    kind: str
    method: str
    base: str
    adapter: Path
    metric: str
    scores: Mapping[str, Mapping[str, float]]
    trained_numbers: int
    head_numbers: int
    bytes_on_disk: int
    head_bytes: int
    seconds: float
    final_loss: float
    evaluations: tuple[Mapping[str, float], ...] = ()
    best_step: int | None = None
    labels: tuple[str, ...] = ()
    problem: str = ""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    headline: str = ""
    verified: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    coverage: Coverage | None = None

    def table(self) -> str:
        """What has to be said first, if anything, and the figures as a table for a terminal (GitHub Markdown)."""
        return "\n\n".join(filter(None, [self.headline, self.figures()]))

    def figures(self) -> str:
        """The figures as a table."""
        shown = [name for name in self.scores["test"] if name in self.scores["base"]]
        head = [
            "on the test split",
            "numbers trained",
            "of the head",
            "bytes on disk",
            "of the head",
            "seconds",
            *shown,
        ]
        rows = [["base, fresh head" if self.head_numbers else "base", "0", "0", "0", "0", "-"]]
        counted = (self.trained_numbers, self.head_numbers, self.bytes_on_disk, self.head_bytes)
        rows.append([self.method, *(f"{value:,}" for value in counted), f"{self.seconds:.0f}"])
        names = ["base", "test"]
        if "head" in self.scores:
            rows.insert(1, ["head alone", "0", f"{self.head_numbers:,}", "0", f"{self.head_bytes:,}", "-"])
            names.insert(1, "head")
        if "majority" in self.scores:
            rows.insert(0, ["always the commonest", *["-"] * 5])
            names.insert(0, "majority")
        for row, name in zip(rows, names, strict=True):
            row += [f"{self.scores[name][score]:.4f}" if score in self.scores[name] else "-" for score in shown]
        return table(head, rows)


def card(report: FinetuneReport) -> str:
    """README.md of an adapter folder."""
    base, task = public_name(report.base), PIPELINES.get(report.kind, report.kind)
    title = {PROBE: "a trained head", FULL: "a fine-tuned model"}.get(report.method, f"a {report.method} adapter")
    best = f"Best step: {report.best_step if report.best_step is not None else 'the last'}. {' '.join(report.notes)}"
    counts = bullets(
        f"{split}: {', '.join(f'{number:,} {name}' for name, number in some.items())}"
        for split, some in report.counts.items()
    )
    what = f"{report.trained_numbers:,} trained numbers, and {report.head_numbers:,} of the head, on `{base}`. Made with Smidgen."
    return model_card(
        adapter_head(base, task, report.method.replace(":", "-")),
        f"{report.kind}: {title} of {report.bytes_on_disk:,} bytes",
        "\n\n".join(filter(None, [report.headline, what])),
        ("Use", f"```python\n{loading_code(report)}\n```\n\n{_how(report)}"),
        ("Measured", f"{report.figures()}\n\n{best}\n\n![training loss](loss.png)"),
        covered(report.coverage),
        ("Data", "\n\n".join([counts, "Warnings:", bullets(report.warnings) or "None."])),
        licence(base, "data"),
    )


def loading_code(report: FinetuneReport) -> str:
    """Python that loads the base and what was trained, and asks it once."""
    from smidgen.bases import packaged

    auto, base, folder = AUTO[report.kind], public_name(report.base), '"path/of/this/folder"'
    lines = [f"from transformers import {auto}{_reader(report.kind)}"]
    where = repr(base)
    if base in packaged.MODELS:
        lines.insert(0, "from smidgen.bases.packaged import model_folder")
        where = f"model_folder({base!r})"
    names = dict(enumerate(report.labels))
    labels = f", id2label={names}" if names else ", num_labels=1" if report.kind == "text-classification" else ""
    labels += f", problem_type={MULTI!r}" if report.problem == MULTI else ""
    load = [f"model = {auto}.from_pretrained(base{labels})"]
    if report.method == FULL:
        load = [f"model = {auto}.from_pretrained({folder})"]
    elif report.method == PROBE:
        lines = ["from pathlib import Path", "from smidgen.training import engine", *lines]
        load.append(f"engine.load(model, Path({folder}))")
    elif report.method.startswith("peft:"):
        lines.insert(0, "import peft")
        load.append(f"model = peft.PeftModel.from_pretrained(model, {folder})")
    else:
        lines.insert(0, "import smidgen")
        load.append(f"smidgen.load(model, {folder})")
    return "\n".join([*lines, "", f"base = {where}", *load, "model.eval()", *_asking(report)])


def _reader(kind: str) -> str:
    return "" if kind == "image-classification" else ", AutoTokenizer"


def _asking(report: FinetuneReport) -> list[str]:
    if report.kind == "image-classification":
        return ["# pixel_values: pictures as the base's image processor makes them", "# model(pixel_values).logits"]
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(base)"
    if report.kind == "instruction":
        return [
            tokenizer,
            'messages = [{"role": "user", "content": "Hello!"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    answer = "model.config.id2label[int(logits.argmax())]" if report.labels else "float(logits)"
    if report.problem == MULTI:
        answer = "[model.config.id2label[at] for at, p in enumerate(logits[0].sigmoid()) if p > 0.5]"
    asked = 'logits = model(**tokenizer("Some text.", return_tensors="pt")).logits'
    return [tokenizer, asked, f"print({answer})"]


def _how(report: FinetuneReport) -> str:
    if report.method == FULL:
        return "The folder is an ordinary transformers model."
    if report.method == PROBE:
        return "`head.safetensors` holds the head's tensors by their names in the model."
    verb = "chat" if report.kind == "instruction" else "classify"
    note = f"`smidgen {verb} FOLDER` takes it as it is. The files are ordinary peft (`adapter_config.json`, `adapter_model.safetensors`)"
    if report.method.startswith("peft:"):
        return f"{note}."
    return f"{note}; after `import smidgen`, `peft.PeftModel.from_pretrained(model, folder)` reads them too, head included."
