"""A fine-tuned model becomes an adapter: which family holds its change, what the file is worth, and a little training.

found = extract("minilm", "my-finetuned-minilm", Path("mood"))
print(told(found))
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters import extract as engine
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.example_inputs import examples
from smidgen.adapters.extract import LEAST, Extraction
from smidgen.bases.checkpoints import Checkpoint, named_alike, read_checkpoint, read_finetuned
from smidgen.bases.transformers import load_tokenizer
from smidgen.errors import ConfigError, DataError, SmidgenError
from smidgen.tasks import cards
from smidgen.tasks.data.tables import read_splits
from smidgen.training.metrics import REGRESSION, SINGLE

logger = logging.getLogger(__name__)

DENOISERS = ("unet", "transformer")  # whose adapter lies in the folder itself
LENGTH, BATCH = 128, 32
MOST_RUN = 4 * 2**30  # bytes of a model that is loaded only to tell what the adapter keeps of its answers
Inputs = list[Callable[[nn.Module], Any]]


@dataclass
class Rows:
    """Texts for a model, with their labels where there are some."""

    texts: list[str]
    labels: list[Any] = field(default_factory=list)


def extract(
    base: str,
    finetuned: str,
    out: Path | None = None,
    *,
    methods: Sequence[str] = (),
    least: float = LEAST,
    seed: int = 0,
    data: Path | None = None,
    distill: Path | None = None,
    distill_steps: int = 200,
    progress: Callable[[int, int], None] = lambda at, of: None,
) -> dict[str, Extraction]:
    """Extracts an adapter from two models on disk, component by component, and writes it if it is worth it.

    Args:
        base, finetuned: folders of transformers models or diffusers pipelines, safetensors files, or names of ours; ``finetuned``
            also a file of whole differences (``smidgen export --to full-diff``).
        out: the adapter's folder; None only looks.
        methods, least, seed: as in :func:`smidgen.adapters.extract.extract`.
        progress: called with (layers done, layers), once more for each component; then with (steps done, steps).
        data: a table with a column text, and label for a score.
        distill: a table with a column text, on which the adapter is trained to answer as the fine-tuned model.
        distill_steps: how long.

    Returns:
        What was found by component, ``""`` for a model alone. Nothing is written where no family holds enough.

    Raises:
        SmidgenError: for what cannot be read or compared.
    """
    here = read_checkpoint(base)
    there = read_finetuned(finetuned, here)
    if distill is not None and out is None:
        raise ConfigError("--distill trains the adapter that is written; give --out.")
    if here.keys().isdisjoint(there):
        if len(here) > 1 and len(there) == 1 and "" in there:  # a component's folder beside its pipeline
            there = {_part_of(here, there[""]): there[""]}
        else:
            raise ConfigError(
                f"{base} holds {', '.join(map(repr, here))} and {finetuned} {', '.join(map(repr, there))}: nothing to compare."
            )
    found: dict[str, Extraction] = {}
    with TemporaryDirectory() as scratch:
        for part in sorted(here.keys() & there.keys()):
            place = None if out is None else Path(scratch) / ("" if part in DENOISERS else part)
            name = public_name(base)
            made = _component(here[part], there[part], place, methods, least, seed, name, progress)
            if made.layers or made.left:
                found[part] = made
            if made.folder is not None:
                _finish(here[part], there[part], made.folder, made, data, distill, distill_steps, seed, progress)
        if not any(one.layers for one in found.values()):
            left = sum(count for one in found.values() for count, _ in one.left.values())
            raise SmidgenError(
                f"No layer that can carry an adapter differs between {base} and {finetuned}"
                + (f"; {left} norms, biases or embeddings do." if left else ": they hold the same numbers.")
            )
        if out is not None and any(one.chosen for one in found.values()):
            with new_files(out) as whole:
                shutil.copytree(scratch, whole, dirs_exist_ok=True)
    return found


def told(found: Mapping[str, Extraction], least: float = LEAST) -> str:
    """A page of text about what was found."""
    return "\n\n".join(_told(part, one, least) for part, one in found.items())


def _told(part: str, one: Extraction, least: float) -> str:
    lines = [
        f"{part or 'The model'}: {len(one.layers)} layers changed, {one.same} did not; they hold {one.carried:.1%} of the change"
    ]
    if one.rounding > 0.01:
        lines.append(f"  {one.rounding:.1%} of it is no more than rounding to the number format")
    lines += [
        f"  not carried: {count} {group}, {share:.1%} of the change" for group, (count, share) in one.left.items()
    ]
    if one.new:
        lines.append(f"  kept as they are: {', '.join(one.new)}, which the base has not")
    rows = [
        [
            f.label,
            f"{f.numbers:,}",
            f"{f.bytes:,}",
            f"{f.explained:.1%}",
            "all but rounding" if f.recovered else f"{f.worst[1]:.1%}",
        ]
        for f in one.fits
    ]
    lines += ["", cards.table(["family", "numbers", "bytes", "explained", "worst layer"], rows), ""]
    if one.chosen is None:
        best = max(one.fits, key=lambda f: f.explained)
        lines.append(
            f"None fits: the most that a family explains is {best.explained:.1%} ({best.label}), and a file is worth writing from "
            f"{least:.0%}. Try larger sizes (--methods lora:128), or take less (--least-explained)."
        )
    elif one.chosen.recovered:
        lines.append(f"{one.chosen.label} made this change: it is recovered to rounding.")
    else:
        lines.append(
            f"{one.chosen.label} is the smallest that holds at least {least:.0%} of the change: {one.chosen.explained:.1%}."
        )
    lines += [f"  {name}: {value:.4g}" for name, value in one.score.items()]
    return "\n".join(lines)


def _component(
    here: Checkpoint, there: Checkpoint, place: Path | None, methods: Sequence[str], least: float, seed: int,
    name: str, progress: Callable[[int, int], None],
) -> Extraction:  # fmt: skip
    model = there.skeleton() or here.skeleton()
    before, after = here.tensors, there.tensors
    if model is not None:
        names = dict(model.named_parameters())
        before, after = named_alike(before, names), named_alike(after, names)
        if len(after) < 0.9 * len(names):  # the library gives tensors other names than its files do
            logger.warning("%s is read as a whole: its files have other names than its layers.", there.path)
            model, before, after = _loaded(here, there)
    return engine.extract(
        before, after, place, model=model, methods=methods, least=least, seed=seed, base_name=name,
        task_type=_task(there.config), **_classes(there.config), progress=progress,
    )  # fmt: skip


def _loaded(here: Checkpoint, there: Checkpoint) -> tuple[Any, Mapping[str, Tensor], Mapping[str, Tensor]]:
    tuned, _ = there.load()
    base, missing = type(tuned).from_pretrained(here.path, output_loading_info=True, ignore_mismatched_sizes=True)
    before = {n: p.detach() for n, p in base.named_parameters() if n not in missing["missing_keys"]}
    return tuned, before, {n: p.detach() for n, p in tuned.named_parameters()}


def _task(config: Mapping[str, Any]) -> str | None:
    kind = (config.get("architectures") or [""])[0]
    ends = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in ends.items() if kind.endswith(end)), None)


def _classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a classifier of texts or images and what kind of answer it gives, where its config says them."""
    kind = (config.get("architectures") or [""])[0]
    if not kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {}
    named = {int(at): str(name) for at, name in (config.get("id2label") or {}).items()}
    problem = config.get("problem_type") or (REGRESSION if len(named) == 1 else SINGLE)
    labels = [named[at] for at in sorted(named)] if problem != REGRESSION else None
    return {"labels": labels, "problem_type": None if problem == SINGLE else problem}


def _part_of(here: Mapping[str, Checkpoint], alone: Checkpoint) -> str:
    """The component of a pipeline that a folder beside it is one of."""
    same = [
        part for part, one in here.items() if one.model_class() is not None and one.model_class() is alone.model_class()
    ]
    if not same:
        raise ConfigError(f"{alone.path} is none of the base's components ({', '.join(here)}).")
    return same[0]


# ---- what the file is worth --------------------------------------------------------------------------------------------


def _finish(
    here: Checkpoint, there: Checkpoint, folder: Path, found: Extraction, data: Path | None, distill: Path | None,
    steps: int, seed: int, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Measures what was extracted on inputs, trains it if wished, and measures again."""
    if there.model_class() is None:
        if data is not None or distill is not None:
            raise ConfigError(f"{there.path} does not say which model it is, so it cannot be run on data.")
        return
    if data is None and distill is None and getattr(there.tensors, "bytes", 0) > MOST_RUN:
        logger.warning(
            "%s is large, so it is not run: --data FILE tells what the adapter keeps of its answers.", there.path
        )
        return
    model, _ = there.load()
    rows = None if data is None else read_rows(data)
    inputs = _inputs(model, there, here, rows)
    taught = None if distill is None else _inputs(model, there, here, read_rows(distill))
    tuned = _answers(model, inputs)
    wanted = None if taught is None else _answers(model, taught)
    names = dict(model.named_parameters())
    before = named_alike(here.tensors, names)
    with torch.no_grad():
        for name in before:
            if names[name].shape == before[name].shape:
                names[name].copy_(before[name])
    plain = _answers(model, inputs)
    api.load(model, folder)
    _score(found, model, inputs, tuned, plain, rows, "extracted")
    if taught is not None and wanted is not None:
        train(model, taught, wanted, steps, seed, progress=progress)
        _score(found, model, inputs, tuned, plain, rows, "distilled")
        api.save(model, folder)


def read_rows(path: Path) -> Rows:
    """The texts of a table, and their labels where all have one.

    Raises:
        DataError: no column text.
    """
    splits = read_splits(path)
    rows = [row.values for row in splits.get("test") or splits["train"]]
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
    if not texts:
        raise DataError(f"{path} has no texts in a column called text; it has {', '.join(map(repr, rows[0]))}.")
    labels = [
        row["label"]
        for row in rows
        if isinstance(row.get("text"), str) and row["text"].strip() and row.get("label") is not None
    ]
    return Rows(texts, labels if len(labels) == len(texts) else [])


def _inputs(model: Any, there: Checkpoint, here: Checkpoint, rows: Rows | None) -> Inputs:
    """Passes of the model: over batches of texts, or over an example made from its config."""
    if rows is None:
        for example in examples(model):
            try:
                with torch.no_grad():
                    example.run()
            except Exception:  # a guess that the model refuses
                continue
            return [lambda _, run=example.run: run()]  # type: ignore[misc]
        return []
    folder = there.path if any(there.path.glob("tokenizer*")) else here.path
    tokenizer = load_tokenizer(str(folder))
    made: Inputs = []
    for start in range(0, len(rows.texts), BATCH):
        batch = tokenizer(
            rows.texts[start : start + BATCH], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        batch = {key: value for key, value in batch.items() if key in tokenizer.model_input_names}
        made.append(lambda owner, batch=batch: owner(**batch))  # type: ignore[misc]
    return made


def _answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [_first(run(model)).float() for run in inputs]


def _first(output: Any) -> Tensor:
    """The main tensor of what a model gives."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "sample", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)  # type: ignore[no-any-return]
    return next(
        value for value in (output.values() if isinstance(output, Mapping) else output) if isinstance(value, Tensor)
    )


def _score(
    found: Extraction,
    model: Any,
    inputs: Inputs,
    tuned: list[Tensor],
    plain: list[Tensor],
    rows: Rows | None,
    what: str,
) -> None:
    if not inputs:
        return
    now = _answers(model, inputs)
    change = _norm(tuned, plain)
    found.score[f"|f_{what} - f_finetuned| / |f_finetuned - f_base|"] = _norm(now, tuned) / max(change, 1e-30)
    names = {str(name): int(at) for at, name in (getattr(model.config, "id2label", None) or {}).items()}
    if rows is not None and rows.labels and all(str(label) in names or isinstance(label, int) for label in rows.labels):
        wanted = [names.get(str(label), label) for label in rows.labels]
        for which, outputs in (("base with its head", plain), ("finetuned", tuned), (what, now)):
            right = [int(at) for batch in outputs for at in batch.argmax(-1)]
            found.score[f"accuracy, {which}"] = sum(map(int.__eq__, right, wanted)) / len(wanted)


def _norm(some: list[Tensor], others: list[Tensor]) -> float:
    return float(sum(float((a - b).double().square().sum()) for a, b in zip(some, others, strict=True)) ** 0.5)


def train(
    model: Any, inputs: Inputs, wanted: list[Tensor], steps: int, seed: int, rate: float = 1e-3,
    progress: Callable[[int, int], None] = lambda at, of: None,
) -> None:  # fmt: skip
    """Trains the active adapter of a model so that it gives ``wanted`` for its inputs, by Adam with a falling rate."""
    trained = [p for n, p in model.named_parameters() if ".smidgen_slots." in n]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    sizes = [float(p.detach().square().mean().sqrt()) or 1e-2 for p in trained]
    groups = [{"params": [p], "lr": rate * max(size, 1e-3)} for p, size in zip(trained, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.randint(len(inputs), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    scale = sum(float(w.square().mean()) for w in wanted) / len(wanted)
    for step, at in enumerate(order, 1):
        loss = (_first(inputs[at](model)).float() - wanted[at]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, steps)
