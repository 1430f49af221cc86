"""The common course of the recipes: text classification, image classification, instruction tuning.

A recipe prepares the base with its head and the task; then, here: adapt, train, save, load the file into a fresh base,
prove that it is on and scores what the trained model scored, and report.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import smidgen
from smidgen.adapters.atomic import replace_file
from smidgen.adapters.methods import Kind
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.matching import matched_layers
from smidgen.bases.origin import TASK_TYPES
from smidgen.bases.pipelines import default_device
from smidgen.bases.transformers import fingerprint, revision_of
from smidgen.errors import AdapterFileError, ConfigError, TrainingError
from smidgen.tasks.cards import write_report
from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.finetune.lower import known_below
from smidgen.tasks.finetune.probe import Probe, fit_probe
from smidgen.tasks.finetune.report import FinetuneReport, card
from smidgen.tasks.finetune.settings import FULL, PROBE, Adapter, FinetuneConfig, rates, setup
from smidgen.tasks.going_on import check_start
from smidgen.training import engine
from smidgen.training.fitting import Fitted, Rates, budgeted, fit, prove
from smidgen.training.frozen import frozen_matmuls
from smidgen.training.metrics import SINGLE
from smidgen.training.processes import is_main, num_processes, run_folder
from smidgen.training.settings import decisive, dump_yaml

logger = logging.getLogger(__name__)

SAME = {torch.float32: 1e-3}  # largest relative difference of a reloaded adapter's outputs; 16-bit bases: OTHERS
OTHERS = 2e-2
BUDGETED = "seeded"  # the method a budget trains
PROBED = 20_000  # examples of train up to which the head alone is measured unasked
# Known by their content instead, or of how much is held in memory and where it goes.
_ASIDE = (
    "chat_template",
    "model",
    "from_adapter",
    "num_train_epochs",
    "eval_batch_size",
    "memory_mb",
    "cache_mb",
    "push_to_hub",
    "hub_private",
)


@dataclass(frozen=True)
class Prepared:
    """A base with its fresh head and the task it is to learn, before any adapter.

    ``heads`` are the modules trained and saved with any adapter, ``fresh`` loads the same base with the same fresh head
    again, ``counts`` are examples by split and label, ``data_digest`` says which examples these are.
    """

    model: Any
    task: Any
    heads: tuple[str, ...]
    family: Kind
    fresh: Callable[[], Any] = field(repr=False)
    labels: tuple[str, ...] = ()
    problem: str = ""  # of a classifier, in transformers' terms
    majority: tuple[str, Mapping[str, float]] = ("", {})  # the commonest answer, and what it scores on the test split
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    data_digest: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # further files of the adapter's folder, by name


def finetune(kind: str, config: FinetuneConfig, prepared: Prepared, progress: bool = True) -> FinetuneReport | None:
    """Train, save, prove and score one adapter in ``config.out``; see the module's text.

    ``kind`` is the recipe's name. Under ``accelerate launch`` only the main process returns a report. Raises
    SmidgenError for settings without meaning, a run that diverged, and a saved adapter that does not come back.
    """
    config = _in_steps(_settled(config), prepared)
    chosen, model = config.adapter, prepared.model
    for warning in prepared.warnings:
        logger.warning("%s", warning)
    rate = rates(chosen, prepared.family)
    if config.from_adapter is None:
        _check_fits(kind, config, prepared)
    probe, from_probe = _head(config, prepared)
    config_of_peft = _setup(kind, config, prepared)
    identity = _identity(config, prepared, rate)
    if config.from_adapter is not None:
        identity["from_adapter"] = _check_start(kind, config, prepared, config_of_peft)
    with run_folder(config.out, config.resume_from_checkpoint, config.overwrite) as out:
        if is_main():
            for name, content in {"config.yaml": dump_yaml(config), **prepared.files}.items():
                replace_file(out / name, content)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        options: dict[str, Any] = {"weight_decay": chosen.weight_decay, "identity": identity, "progress": progress}
        options |= {"start": config.from_adapter, "heads": prepared.heads, "resume": config.resume_from_checkpoint}
        options["during"] = _computed_once(config, prepared)
        fitted = fit(chosen.method, model, prepared.task, config_of_peft, rate, config.train, out, **options)
    if not is_main():
        return None
    _check_learnt(fitted, prepared.task.metric, config, from_probe)
    scores, notes = _proved(config, prepared, out)
    loss_plot({fitted.name: fitted.losses}, out / "loss.png")
    headline = ""
    if probe is not None:
        scores["head"], headline = dict(probe.scores["test"]), _beside_head(probe, scores, prepared.task)
        notes.append(
            f"The head alone is a regression on the frozen base's features (C {probe.strength:g}); training started from "
            f"{'it' if from_probe else 'another one (--head probe starts from it)'}."
        )
    report = replace(_report(kind, config, prepared, fitted, scores, notes, identity), headline=headline)
    write_report(out, report, card(report))
    if config.push_to_hub:
        from smidgen.training.hub import push_to_hub

        push_to_hub(out, config.push_to_hub, config.hub_private)
    return report


def targets(config: FinetuneConfig, model: Any) -> Any:
    """The modules to adapt: those named, a regular expression or all-linear as it is, or the attention projections."""
    named = config.adapter.target_modules
    if config.adapter.method in (PROBE, FULL):
        return None
    if named is None:
        return sorted(smidgen.default_targets(model))
    return "all-linear" if named == ("all-linear",) else list(named)


def _settled(config: FinetuneConfig) -> FinetuneConfig:
    """With a budget the config names the method that a budget trains, and nothing else may choose it."""
    chosen = config.adapter
    if config.from_adapter is not None and chosen.budget is not None:
        raise ConfigError("The adapter to go on from decides what is trained; leave out --budget, or --from-adapter.")
    if chosen.budget is None:
        return config
    clash = [name for name in ("rank", "alpha", "transform", "residual", "output") if getattr(chosen, name) is not None]
    if clash or chosen.method not in (Adapter().method, BUDGETED):
        what = clash[0] if clash else f"method {chosen.method}"
        raise ConfigError(f"A budget decides what is trained and how; leave out {what}, or the budget.")
    return replace(config, adapter=replace(chosen, method=BUDGETED))


def _in_steps(config: FinetuneConfig, prepared: Prepared) -> FinetuneConfig:
    """``config`` with as many steps as the epochs it asks for take."""
    if config.num_train_epochs is None:
        return config
    batch = config.data.train_batch_size * config.train.gradient_accumulation_steps * num_processes()
    steps = -(-config.num_train_epochs * len(prepared.task.splits["train"]) // batch)
    return replace(config, train=replace(config.train, max_train_steps=steps))


def _head(config: FinetuneConfig, prepared: Prepared) -> tuple[Probe | None, bool]:
    """The best head on the frozen features, if there is one to be had, and whether the model's head now starts from it."""
    if config.head == "probe" and config.from_adapter is not None:
        raise ConfigError("The adapter to go on from brings its head along; leave out --head probe, or --from-adapter.")
    probe, own = None, {"loss": float("inf")}
    asked = config.head != "fresh" or len(prepared.task.splits["train"]) <= PROBED
    if prepared.heads and config.from_adapter is None and asked:
        model = prepared.model.to(default_device())
        probe = fit_probe(model, prepared.task, prepared.heads, ("validation", "test"), config.frozen_matmuls)
        if config.head == "auto":
            own = prepared.task.evaluate_split(model, "validation")
        model.cpu()  # where it is looked at before training
    if probe is None:
        if config.head == "probe":
            raise ConfigError(
                f"{config.model} has no linear head with a bias that a probe could start; leave out --head."
            )
        return None, False
    taken = config.head != "fresh" and (config.head == "probe" or probe.scores["validation"]["loss"] < own["loss"])
    if taken:
        probe.put(prepared.model)
    return probe, taken


@contextmanager
def _computed_once(config: FinetuneConfig, prepared: Prepared) -> Iterator[None]:
    """Within, what training does not change is computed once, and in bf16 where asked for."""
    train, model = config.train, prepared.model.to(default_device())
    reads = train.max_train_steps * train.gradient_accumulation_steps * config.data.train_batch_size
    with (
        frozen_matmuls(model, config.frozen_matmuls),
        known_below(prepared.task, model, config.cache_mb, reads) as depth,
    ):
        if depth:
            logger.info("The lowest %d layers are computed once for each example.", depth)
        yield


def _beside_head(probe: Probe, scores: Mapping[str, Mapping[str, float]], task: Any) -> str:
    """What has to be said first where the head alone would do as well."""
    alone, found = probe.scores["validation"][task.metric], scores["validation"][task.metric]
    if (found >= alone) if task.greater_is_better else (found <= alone):
        return ""
    return (
        f"**Worse than the head alone**: {task.metric} {found:.4f} on validation, where a regression on the frozen base's features has "
        f"{alone:.4f}. Try another --learning-rate or more steps, or --method {PROBE}."
    )


def _check_start(kind: str, config: FinetuneConfig, prepared: Prepared, wanted: Any) -> str:
    """The digest of the adapter to go on from, which must be what the settings ask for."""
    chosen = config.adapter
    given = {
        name: getattr(chosen, name) for name in ("rank", "alpha", "transform_rank", "target_modules", "store_dtype")
    }
    assert config.from_adapter is not None
    return check_start(config.from_adapter, config.out, kind, wanted, given, prepared.model, prepared.labels)


def _check_fits(kind: str, config: FinetuneConfig, prepared: Prepared) -> None:
    """Refuses targets that are not in this model and a budget that is too small for it, before minutes go into a head."""
    made = _setup(kind, config, replace(prepared, task=None))
    if isinstance(made, SmidgenConfig):
        matched_layers(made, prepared.model)


def _setup(kind: str, config: FinetuneConfig, prepared: Prepared) -> Any:
    """The config that ``engine`` adapts by; it says what a fresh process needs to know of the base."""
    chosen, seed = config.adapter, config.train.seed
    origin: dict[str, Any] = {"task_type": TASK_TYPES.get(kind), "revision": revision_of(config.model)}
    origin |= {"labels": list(prepared.labels) or None}
    origin |= {"problem_type": prepared.problem} if prepared.problem not in ("", SINGLE) else {}
    if chosen.budget is not None:
        where = "all-linear" if chosen.target_modules is None else targets(config, prepared.model)
        origin |= {"seed": seed, "target_modules": where}
        origin |= {"store_dtype": chosen.store_dtype} if chosen.store_dtype else {}
        return budgeted(prepared.model, prepared.task, prepared.heads, chosen.budget, **origin)
    made = setup(chosen, targets(config, prepared.model), seed)
    for name, value in origin.items():
        if hasattr(made, name):
            setattr(made, name, value)
    return made


def _check_learnt(fitted: Fitted, metric: str, config: FinetuneConfig, from_probe: bool) -> None:
    """Refuse an adapter that is best untrained; its files are taken away again. A head from a probe has been trained already."""
    if fitted.best_step != 0 or not config.train.load_best or (from_probe and config.adapter.method == PROBE):
        return
    for file in engine.FILES:
        (config.out / file).unlink(missing_ok=True)
    scores = ", ".join(f"{entry[metric]:.4f} at step {entry['step']}" for entry in fitted.evaluations)
    before = "head alone, which it started from" if from_probe else "untrained adapter"
    before = before if config.from_adapter is None else f"adapter in {config.from_adapter}"
    raise TrainingError(
        f"No step was better on the validation split than the {before} ({metric}: {scores}). Try another "
        "--learning-rate or more steps, or keep the last step with --no-load-best."
    )


def _proved(config: FinetuneConfig, prepared: Prepared, out: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Test scores of the base and of the adapter as it comes back from its file, and what was proved of it."""
    task, device = prepared.task, next(prepared.model.parameters()).device
    trained = task.predict(prepared.model, "test")
    validation = task.evaluate_split(prepared.model, "validation")
    prepared.model.cpu()
    fresh = prepared.fresh().to(device)
    if config.adapter.method == FULL:
        fresh.float()  # as it was trained
    outputs: list[torch.Tensor] = []

    def output() -> torch.Tensor:
        outputs.append(task.predict(fresh, "test"))
        return outputs[-1]

    notes = list(prove(fresh, out, output, "the outputs on the test split"))
    base, again = outputs[0], outputs[-1]
    error = float((again - trained).norm() / trained.norm().clamp(min=1e-12))
    if not error <= SAME.get(fresh.dtype, OTHERS):
        raise AdapterFileError(
            f"The adapter saved in {out} does not answer as the trained model did: outputs on the test split differ by "
            f"{error:.1%}."
        )
    notes.append(f"The saved file's test outputs differ from the trained model's by {error:.1e}.")
    found = {"base": task.scores(base, "test"), "test": task.scores(again, "test"), "validation": validation}
    usual, scored = prepared.majority
    if scored:
        found["majority"] = dict(scored)
        better = found["test"][task.metric] > scored[task.metric]
        notes.append(
            f"Always answering {usual!r}, the commonest of train, would score {task.metric} {scored[task.metric]:.4f} on the test "
            f"split; the adapter {'scores' if better else 'is no better:'} {found['test'][task.metric]:.4f}."
        )
    return found, notes


def _report(
    kind: str,
    config: FinetuneConfig,
    prepared: Prepared,
    fitted: Fitted,
    scores: dict[str, dict[str, float]],
    notes: list[str],
    identity: dict[str, Any],
) -> FinetuneReport:
    return FinetuneReport(
        kind=kind,
        method=config.adapter.method,
        base=config.model,
        adapter=config.out,
        metric=prepared.task.metric,
        scores=scores,
        trained_numbers=fitted.trained_numbers,
        head_numbers=fitted.head_numbers,
        bytes_on_disk=fitted.bytes,
        head_bytes=fitted.head_bytes,
        seconds=fitted.seconds,
        final_loss=sum(fitted.losses[-20:]) / len(fitted.losses[-20:]),
        evaluations=tuple(fitted.evaluations),
        best_step=fitted.best_step,
        labels=prepared.labels,
        problem=prepared.problem,
        counts=prepared.counts,
        warnings=prepared.warnings,
        notes=(_trained_on(kind, prepared), *notes),
        settings=identity,
        coverage=fitted.coverage,
    )


def _trained_on(kind: str, prepared: Prepared) -> str:
    """How many examples were learnt from, and how many measured on."""
    nouns = {"image-classification": "pictures", "text-classification": "texts", "instruction": "conversations"}
    noun = nouns.get(kind, "examples")
    held = prepared.task.splits  # counts are of labels, of which an example may have several
    sizes = {split: own[noun] if noun in own else len(held[split]) for split, own in prepared.counts.items()}
    others = ", ".join(f"{size:,} of {split}" for split, size in sizes.items() if split != "train")
    labels = f" of {len(prepared.labels)} labels" if prepared.labels else ""
    return f"Trained on {sizes.get('train', 0):,} {noun}{labels}; measured on {others}."


def _identity(config: FinetuneConfig, prepared: Prepared, rate: Rates) -> dict[str, Any]:
    """The settings that decide the trained numbers; where things lie and what is shown does not."""
    kept = decisive(config, *_ASIDE) | {"rate": rate.residual, "transform_rate": rate.transform, "head_rate": rate.head}
    return kept | {"data": prepared.data_digest, "base_weights": fingerprint(prepared.model)}
