"""The report of an experiment: table, budgets, claim and plain sentences, all computed from the cells."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from smidgen.adapters.atomic import replace_file
from smidgen.lab.compare import schema
from smidgen.lab.compare.experiment import Claim
from smidgen.lab.compare.plot import draw_plot
from smidgen.lab.compare.table import Results, Row
from smidgen.lab.statistics import (
    AtBudget,
    ClaimResult,
    Difference,
    Interval,
    Point,
    at_budgets,
    front,
    interval,
    paired,
)
from smidgen.tasks import cards
from smidgen.training.settings import to_dict

DEFINITIONS = """* **Head.** Every method starts from one head, a logistic regression on the frozen base's features, and trains it on. The row of the
  head alone is that regression; **gain** is the share of answers that are right, over that of the head alone.
* **Loss and score** are those of the last checkpoint on the test set, after the adapter was stored and came back. The loss (nats) is what
  methods are chosen and compared by.
* **Intervals** are 95 %, of differences paired by seed and example, from a bootstrap that draws both. Two methods of a
  table whose intervals overlap may still differ: their difference has an interval of its own.
* **Bytes** are those of the trained numbers in one packed format, the same for all methods (fp16; int4 with a scale for each 64 numbers),
  and of the config without its defaults. What follows from the base and a seed is not stored. The head, in fp16 with every method, is listed apart.
* **Rate** was found by successive halving on validation, on a seed of its own, with the same number of rates for every method; the
  grid grows until the best rate lies inside. `^` marks a best rate that lies at its edge all the same.
* **Forgetting** is the loss on unrelated data with the adapter on minus off, in nats: less is better.
* **Memory** is the peak resident memory of a fresh process that loads base and data, adapts and trains some steps.
  **Step** is the CPU time of a training step over that of a step of the head alone on the frozen base, the two timed
  in turn in one process; the median of several. A model without a head of its own is compared by its forward pass."""
BAR = 0.003  # of score: what storing in fewer bits may lose
QUICK = 1_000  # draws of the bootstrap where nothing is decided


def write_report(results: Results, folder: Path, singles: Path, command: str) -> Path:
    """``<name>.md``, ``<name>.json`` and ``<name>.png`` in ``folder``; in ``singles`` each training in PEFT's schema."""
    name = results.experiment.name
    draw_plot(results, folder / f"{name}.png")
    replace_file(folder / f"{name}.json", json.dumps(as_json(results), indent=1, allow_nan=False) + "\n")
    for file, values in schema.all_results(results).items():
        replace_file(singles / file, json.dumps(values, indent=2) + "\n")
    page = folder / f"{name}.md"
    replace_file(page, markdown(results, command))
    return page


def budgets(results: Results) -> list[AtBudget]:
    """The best of ours and of peft's at each budget of the experiment; none while cells are missing."""
    if results.missing:
        return []
    ours, theirs = _points(results, "ours"), _points(results, "peft")
    return at_budgets(results.experiment.budgets, ours, theirs)


def claims(results: Results) -> list[ClaimResult]:
    """The papers' claim for each method it names, then for the head alone; none while cells are missing.

    A method holds it only where the head alone fails it: else the experiment cannot tell.
    """
    claim = results.experiment.claim
    baseline = results.of(claim.baseline) if claim else None
    if claim is None or baseline is None or results.missing:
        return []
    probe = results.probe
    alone = None if probe is None else _claim(claim, probe, baseline, True)
    told_apart = alone is not None and alone.verdict == "fails"
    rows = [row for name in claim.methods if (row := results.of(name)) is not None]
    found = [_claim(claim, row, baseline, told_apart) for row in rows]
    return found if alone is None else [*found, replace(alone, told_apart=False)]


def _claim(claim: Claim, row: Row, baseline: Row, told_apart: bool) -> ClaimResult:
    difference = paired(row.scores, baseline.scores)
    assert difference is not None
    counts = row.numbers, baseline.numbers
    return ClaimResult(
        row.method.name, baseline.method.name, difference, *counts, claim.times, claim.margin, told_apart
    )


def rounding(results: Results) -> list[tuple[Row, Row, Difference]]:
    """Of each method its row in the first format and in the last, and the loss of score between them, by size."""
    first, last = results.experiment.formats[0], results.experiment.formats[-1]
    rows = {(row.method.name, row.format): row for row in results.family("ours", "peft")}
    found = []
    for (name, each), coarse in rows.items():
        fine = rows.get((name, first))
        if (
            each == last != first
            and fine is not None
            and (lost := paired(fine.scores, coarse.scores, QUICK)) is not None
        ):
            found.append((fine, coarse, lost))
    return found


def as_json(results: Results) -> dict[str, Any]:
    """Everything the page says, as plain values."""
    return {
        "experiment": to_dict(results.experiment),
        "metric": results.metric,
        "greater_is_better": results.greater_is_better,
        "interval": "95 %, bootstrap over seeds and examples",
        "rows": [_row_json(row, results) for row in results.rows],
        "front": {family: [p.name for p in front(_points(results, family))] for family in ("ours", "peft")},
        "budgets": [_budget_json(found) for found in budgets(results)],
        "claims": [asdict(found) | {"verdict": found.verdict} for found in claims(results)],
        "rounding": [
            {"method": fine.method.name, "from": fine.format, "to": coarse.format, "lost": asdict(lost)}
            for fine, coarse, lost in rounding(results)
        ],
        "missing": list(results.missing),
        "cpu_seconds": dict(results.cpu_seconds),
        "cells": results.cells_done,
    }


def markdown(results: Results, command: str) -> str:
    """The page for docs/results."""
    experiment, name = results.experiment, results.experiment.name
    total, parts = sum(results.cpu_seconds.values()), results.cpu_seconds.items()
    cost = ", ".join(f"{stage} {seconds / 60:.0f}" for stage, seconds in parts if seconds)
    return cards.page(
        experiment.title or name,
        *_warnings(results),
        _setting(results),
        _table(results),
        f"![loss against bytes]({name}.png)",
        *_verdicts(results),
        *_rounding(results),
        ("What went wrong or is missing", cards.bullets(_notes(results))),
        ("What is measured", DEFINITIONS),
        (
            "Again",
            f"    {command}\n\nThe {results.cells_done:,} cells took {total / 60:.0f} minutes of one CPU core together ({cost}), "
            f"{total / max(1, results.cells_done):.0f} seconds each.",
        ),
    )


def _verdicts(results: Results) -> list[tuple[str, str]]:
    if results.missing:
        return []
    found = [("By budget", f"{_budget_table(results)}\n\n{cards.bullets(_reading(results))}")]
    if results.experiment.claim is not None:
        found.append(("The papers' claim", cards.bullets(_claim_lines(results))))
    return found


def _rounding(results: Results) -> list[tuple[str, str]]:
    """What the last format loses against the first, from the largest loss to the smallest."""
    found = sorted(rounding(results), key=lambda one: -one[2].mean)
    if not found:
        return []
    fine, coarse, _ = found[0]
    names = [f"{row.name.rpartition(', ')[2]}" for row in (fine, coarse)]
    head = ["method", f"{names[0]} bytes", f"{names[1]} bytes", f"loss {names[0]}", f"loss {names[1]}", "score lost"]
    rows = [
        [
            a.method.name,
            f"{a.bytes:,}",
            f"{b.bytes:,}",
            _number(a.loss),
            _number(b.loss),
            _shown(lost),
        ]
        for a, b, lost in found
    ]
    over = [a.method.name for a, _, lost in found if lost.mean > BAR]
    said = f"Above the bar of {BAR}: {', '.join(over)}." if over else f"Every method is within the bar of {BAR}."
    text = f"The same trainings, stored with fewer bits; the share of right answers lost, paired by seed and example. {said}"
    return [(f"What {names[1]} costs", f"{text}\n\n{cards.table(head, rows, left=1)}")]


def _warnings(results: Results) -> Iterator[str]:
    if results.missing:
        yield f"**Interim: {len(results.missing)} cells are not done**, so nothing is decided yet."
    elif results.probe is not None:
        behind = [row.name for row in results.family("ours", "peft") if row.loss >= results.probe.loss]
        if behind:
            yield f"**No better than the head alone**, by test loss: {', '.join(behind)}."
    decided = budgets(results)
    told = {"peft": "behind at", "undecided": "not decided at", "ours": "ahead at"}
    found = {said: [f"{e.budget / 1000:g}" for e in decided if e.verdict == verdict] for verdict, said in told.items()}
    if any(found.values()):
        parts = [f"{said} {', '.join(sizes)} kB" for said, sizes in found.items() if sizes]
        yield f"**Our best against peft's best, by bytes**: {'; '.join(parts)}."


def _points(results: Results, family: str) -> list[Point]:
    return [row.point for row in results.family(family)]


def _setting(results: Results) -> str:
    experiment = results.experiment
    config, search = experiment.config(), experiment.search
    rates = max(len(method.rates) for method in experiment.methods)
    counts = [rates, *(each.keep for each in search.rounds[:-1])]
    rounds = ", then ".join(
        f"{count} for {each.steps} steps" for count, each in zip(counts, search.rounds, strict=True)
    )
    return (
        f"`{config.model}` on `{config.data.path}`, {experiment.recipe}: {config.train.max_train_steps} steps of "
        f"{config.data.train_batch_size}, seeds {', '.join(map(str, experiment.seeds))}, the last checkpoint. Learning rates: "
        f"{rounds}, on seed {search.seed}, by the loss on validation. The head is trained on with every method, at its own rate of "
        f"{config.adapter.head_learning_rate:g}."
    )


def _table(results: Results) -> str:
    measured = {
        "forgetting": any(row.forgetting for row in results.rows),
        "cost": any(row.peak_memory is not None for row in results.rows),
    }
    head = [
        "method",
        "family",
        "bytes",
        "head bytes",
        "numbers",
        "test loss",
        results.metric,
        "gain",
        "rate",
        "train s",
    ]
    head += ["forgetting"] if measured["forgetting"] else []
    head += ["memory MB", "step"] if measured["cost"] else []
    return cards.table(head, [_cells(row, results, measured) for row in results.rows], left=2)


def _cells(row: Row, results: Results, measured: Mapping[str, bool]) -> list[str]:
    if not row.losses:
        state, length = "failed" if row.failures else "not done", 10 + measured["forgetting"] + 2 * measured["cost"]
        return [row.name, row.method.family, "-", "-", "-", state, *["-"] * (length - 6)]
    rate = "-" if row.choice is None else f"{row.choice.rate:g}{'^' if row.choice.at_edge else ''}"
    scored = fmean(found[results.metric] for found in row.test.values())
    found = [row.name, row.method.family, f"{row.bytes:,}", f"{row.head_bytes:,}", f"{row.numbers:,}"]
    found += [_number(row.loss), _number(scored), _shown(_gain(row, results)), rate, f"{row.seconds:.0f}"]
    if measured["forgetting"]:
        found.append(_shown(interval(list(row.forgetting.values())) if row.forgetting else None))
    if measured["cost"]:
        memory = "-" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}"
        found += [memory, "-" if row.step_ratio is None else f"{row.step_ratio:.2f}x"]
    return found


def _gain(row: Row, results: Results) -> Difference | None:
    """What a row scores above the head alone."""
    if results.probe is None or row is results.probe:
        return None
    return paired(row.scores, results.probe.scores, QUICK)


def _budget_table(results: Results) -> str:
    head = [
        "at most",
        "ours",
        "peft",
        "loss, ours minus peft",
        f"{results.metric}, ours minus peft",
        "p (Holm)",
        "better",
    ]
    words = {"undecided": "not decided", "none": "-"}
    rows = []
    for found in budgets(results):
        best = [_best(point) for point in (found.ours, found.peft)]
        verdict, p = words.get(found.verdict, found.verdict), "-" if found.loss is None else f"{found.p:.3f}"
        rows.append([f"{found.budget / 1000:g} kB", *best, _shown(found.loss), _shown(found.score), p, verdict])
    return cards.table(head, rows, left=3)


def _best(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.name}: {np.mean(list(point.losses.values())):.3f} ({point.bytes:,} B)"


def _reading(results: Results) -> Iterator[str]:
    """Where ours lose, win, or nothing is decided, in sentences."""
    order = ("peft", "undecided", "ours")
    for entry in sorted(budgets(results), key=lambda e: order.index(e.verdict) if e.verdict in order else len(order)):
        at = f"at {entry.budget / 1000:g} kB"
        pair = f"{_name(entry.ours)} against peft's {_name(entry.peft)}: {_shown(entry.loss)} nats"
        if entry.verdict == "peft":
            yield f"**Ours lose {at}**: {pair}."
        elif entry.verdict == "undecided" and entry.loss is not None:
            yield f"Not decided {at}, ours {'ahead' if entry.loss.mean < 0 else 'behind'}: {pair}."
        elif entry.verdict == "ours":
            yield f"Ours win {at}: {pair}."
    yield (
        "In each family the best was chosen by its validation loss and compared by its test loss, at .05 after Holm's "
        "correction over the budgets."
    )


def _claim_lines(results: Results) -> Iterator[str]:
    claim, found = results.experiment.claim, claims(results)
    if claim is None:
        return
    if results.probe is None:
        yield "**Cannot tell**: the experiment has no linear probe, which must fail the claim before anything can hold it."
    elif any(one.method == results.probe.method.name and one.verdict != "fails" for one in found):
        yield "**Cannot tell**: the head alone, without an adapter, does not fail the claim."
    for one in found:
        fewer = f", {one.baseline_numbers / one.numbers:.1f} times fewer" if one.numbers else ""
        size = "" if one.small_enough else f", not the {claim.times:g} times claimed"
        yield (
            f"{one.method} **{one.verdict}**: {_shown(one.difference)} of the answers right against {one.baseline}, margin {one.margin:g}; "
            f"{one.numbers:,} numbers instead of {one.baseline_numbers:,}{fewer}{size}."
        )
    for name in (name for name in (claim.baseline, *claim.methods) if results.of(name) is None):
        yield f"Not checked: {name} has no result."


def _notes(results: Results) -> Iterator[str]:
    first = [row for row in results.rows if row.format in results.first]
    for row in first:
        yield from row.failures
    for row in first:
        if row.choice is not None and row.choice.at_edge and not row.choice.failed:
            grid = ", ".join(f"{rate:g}" for rate in row.choice.grid)
            yield f"{row.method.name}: the best rate {row.choice.rate:g} lies at the edge of its grid ({grid})."
    if results.missing:
        yield f"Not done: {'; '.join(results.missing[:5])}{' and others' if len(results.missing) > 5 else ''}."


def _row_json(row: Row, results: Results) -> dict[str, Any]:
    gain = _gain(row, results) if row.losses else None
    return {
        "method": row.method.name,
        "format": row.format,
        "family": row.method.family,
        "kind": row.method.kind,
        "options": dict(row.method.options),
        "target_modules": results.experiment.targets(row.method),
        "learning_rate": asdict(row.choice) if row.choice and not row.choice.failed else None,
        "test": {
            "loss": row.loss if row.losses else None,
            "by_seed": {n: dict(found) for n, found in row.test.items()},
        },
        "validation": {"by_seed": {n: dict(found) for n, found in row.validation.items()}},
        "gain_over_head": asdict(gain) if gain else None,
        "forgetting": {"by_seed": dict(row.forgetting)},
        "trained_numbers": row.numbers,
        "head_numbers": row.head_numbers,
        "bytes": row.bytes,
        "file_bytes": row.file_bytes,
        "head_bytes": row.head_bytes,
        "train_cpu_seconds": row.seconds,
        "peak_memory_bytes": row.peak_memory,
        "step_ratio": row.step_ratio,
        "failures": list(row.failures),
    }


def _budget_json(found: AtBudget) -> dict[str, Any]:
    return {
        "bytes": found.budget,
        "ours": found.ours and found.ours.name,
        "peft": found.peft and found.peft.name,
        "loss": asdict(found.loss) if found.loss else None,
        "score": asdict(found.score) if found.score else None,
        "p_holm": found.p,
        "verdict": found.verdict,
    }


def _name(point: Point | None) -> str:
    return point.name if point is not None else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shown(found: Interval | Difference | None) -> str:
    if found is None:
        return "-"
    bounds = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{bounds}"
