"""The report of an experiment: table, budgets, claim and plain sentences, all computed from the cells."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smidgen.adapters.atomic import replace_file
from smidgen.lab.compare import schema
from smidgen.lab.compare.experiment import PROBE
from smidgen.lab.compare.plot import draw_plot
from smidgen.lab.compare.table import Results, Row
from smidgen.lab.statistics import (
    AtBudget,
    ClaimResult,
    Interval,
    Point,
    at_budget,
    check_claim,
    front,
    interval,
)
from smidgen.tasks import cards
from smidgen.training.settings import to_dict

DEFINITIONS = """* **Scores** are those of the checkpoint with the best validation score, on the test set. Brackets: 95 %
  Student t intervals over seeds. Seeds share the order of the data and the start of the head between methods, so
  differences are paired by seed.
* **Bytes** are `adapter_model.safetensors` and `adapter_config.json` as written to disk, the safetensors file
  rewritten without the tensors of the head, which is the same size for every method. The head is listed apart.
* **Numbers** are the trained numbers of the adapter, again without the head.
* **Forgetting** is the loss on unrelated data with the adapter on minus off, in nats: less is better.
* **Memory** is the peak resident memory of a fresh process that loads base and data, adapts and trains some steps.
  **Step** is the CPU time of a training step over that of a step of the head alone on the frozen base, the two timed
  in turn in one process; the median of several. A model without a head of its own is compared by its forward pass.
* **Rate** was chosen on validation on a seed of its own, with the same number of rates for every method. `^` marks a
  best rate at the edge of its grid, extensions included."""


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
    """The best of ours and of peft's at each budget of the experiment; none where it is a smoke test."""
    if results.experiment.smoke:
        return []
    ours, theirs = _points(results, "ours"), _points(results, "peft")
    return [at_budget(budget, ours, theirs, results.greater_is_better) for budget in results.experiment.budgets]


def claims(results: Results) -> list[ClaimResult]:
    """The papers' claim for each method it names and for the linear probe, as far as there are scores."""
    claim = results.experiment.claim
    if claim is None or results.experiment.smoke:
        return []
    scored = {row.method.name: row for row in results.rows if row.test}
    if claim.baseline not in scored:
        return []
    scores = {name: row.test for name, row in scored.items()}
    numbers = {name: row.numbers for name, row in scored.items()}
    rest = (scores, numbers, claim.times, claim.margin, results.greater_is_better)
    probes = [row.method.name for row in results.rows if row.method.kind == PROBE]
    return [check_claim(name, claim.baseline, *rest) for name in (*claim.methods, *probes) if name in scored]


def as_json(results: Results) -> dict[str, Any]:
    """Everything the page says, as plain values."""
    return {
        "experiment": to_dict(results.experiment),
        "metric": results.metric,
        "greater_is_better": results.greater_is_better,
        "interval": "95 % Student t over seeds",
        "methods": [_row_json(row) for row in results.rows],
        "front": {f: [p.name for p in front(_points(results, f), results.greater_is_better)] for f in ("ours", "peft")},
        "budgets": [_budget_json(found) for found in budgets(results)],
        "claims": [asdict(found) | {"verdict": found.verdict} for found in claims(results)],
        "missing": list(results.missing),
        "cpu_seconds": results.cpu_seconds,
    }


def markdown(results: Results, command: str) -> str:
    """The page for docs/results."""
    experiment, name = results.experiment, results.experiment.name
    minutes = results.cpu_seconds / 60
    return cards.page(
        experiment.title or name,
        *_warnings(results),
        _setting(results),
        _table(results),
        f"![score against bytes]({name}.png)",
        *([] if experiment.smoke else _verdicts(results)),
        ("What went wrong or is missing", cards.bullets(_notes(results))),
        ("What is measured", DEFINITIONS),
        (
            "Again",
            f"    {command}\n\nAll cells together took {minutes:.0f} minutes of one CPU core: about {minutes / 2:.0f} minutes "
            "with two workers on two idle cores.",
        ),
    )


def _verdicts(results: Results) -> list[tuple[str, str]]:
    return [
        ("By budget", f"{_budget_table(results)}\n\n{cards.bullets(_reading(results))}"),
        ("The papers' claim", cards.bullets(_claim_lines(results))),
    ]


def _warnings(results: Results) -> Iterator[str]:
    if results.experiment.smoke:
        yield f"**A smoke test of the harness, which decides nothing about methods.** {results.experiment.smoke}"
    if results.missing:
        yield (
            f"**Interim: {len(results.missing)} cells are not done**, so budgets and fronts are those of the finished "
            "part alone."
        )


def _points(results: Results, family: str) -> list[Point]:
    return [row.point for row in results.family(family)]


def _setting(results: Results) -> str:
    experiment = results.experiment
    config, search = experiment.config(), experiment.search
    grown = f", up to {search.extensions} more where the edge of the grid wins" if search.extensions else ""
    return (
        f"`{config.model}` on `{config.data.path}`, {experiment.recipe}: {config.train.max_train_steps} steps of "
        f"{config.data.train_batch_size}, seeds {', '.join(map(str, experiment.seeds))}. Learning rates: "
        f"{len(experiment.methods[0].rates)} for each method{grown}, {search.steps} steps each on seed {search.seed}, chosen by validation "
        f"{'loss' if search.by == 'loss' else 'score'}. "
        f"The head is trained with every method, at its own rate of {config.adapter.head_learning_rate:g} (the linear "
        "probe searches it)."
    )


def _table(results: Results) -> str:
    measured = {
        "forgetting": any(row.forgetting for row in results.rows),
        "cost": any(row.peak_memory is not None for row in results.rows),
    }
    head = ["method", "family", "bytes", "numbers", f"test {results.metric}", "validation", "rate", "train s"]
    head += ["forgetting"] if measured["forgetting"] else []
    head += ["memory MB", "step"] if measured["cost"] else []
    shown = cards.table(head, [_cells(row, measured) for row in results.rows], left=2)
    sizes = sorted({row.head_bytes for row in results.rows if row.head_numbers})
    numbers = max(row.head_numbers for row in results.rows)
    said = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") if sizes else ""
    head_line = f"The head, trained and stored beside every adapter: {numbers:,} numbers, {said} bytes."
    return f"{shown}\n\n{head_line}" if sizes else shown


def _cells(row: Row, measured: Mapping[str, bool]) -> list[str]:
    rate = "-" if row.choice is None else f"{row.choice.rate:g}{'^' if row.choice.at_edge else ''}"
    validation = interval(list(row.validation.values())).mean if row.validation else None
    found = [row.method.name, row.method.family, f"{row.bytes:,}", f"{row.numbers:,}", _shown(row.score)]
    found += [_number(validation), rate, f"{row.seconds:.0f}"]
    if measured["forgetting"]:
        found.append(_shown(interval(list(row.forgetting.values())) if row.forgetting else None, sign=True))
    if measured["cost"]:
        memory = "-" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}"
        found += [memory, "-" if row.step_ratio is None else f"{row.step_ratio:.2f}x"]
    state = "failed" if row.failures else "not done"
    return found if row.test else [*found[:2], "-", "-", state, *["-"] * (len(found) - 5)]


def _budget_table(results: Results) -> str:
    head = ["at most", "ours", "peft", "ours minus peft", "better"]
    words = {"undecided": "not decided", "none": "-"}
    rows = []
    for found in budgets(results):
        best = [_best(point) for point in (found.ours, found.peft)]
        verdict = words.get(found.verdict, found.verdict)
        rows.append([f"{found.budget / 1000:g} kB", *best, _shown(found.difference, sign=True), verdict])
    return cards.table(head, rows, left=3)


def _best(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.name}: {interval(list(point.score.values())).mean:.3f} ({point.bytes:,} B)"


def _reading(results: Results) -> Iterator[str]:
    """Where ours lose, win, or nothing is decided, in sentences."""
    metric = results.metric
    order = ("peft", "undecided", "ours")
    for entry in sorted(budgets(results), key=lambda e: order.index(e.verdict) if e.verdict in order else len(order)):
        at, gap = f"at {entry.budget / 1000:g} kB", _shown(entry.difference, sign=True)
        pair = f"{_name(entry.ours)} against peft's {_name(entry.peft)}: {gap} {metric}"
        if entry.verdict == "peft":
            yield f"**Ours lose {at}**: {pair}."
        elif entry.verdict == "undecided" and entry.difference is not None:
            ahead = "ahead" if (entry.difference.mean > 0) == results.greater_is_better else "behind"
            yield f"Not decided {at}, ours {ahead}: {pair}."
        elif entry.verdict == "ours":
            yield f"Ours win {at}: {pair}."
    yield (
        "In each family the best was chosen by its validation score and compared by its test score. Not decided: the "
        "interval of the difference holds 0, or there are too few seeds for one."
    )


def _claim_lines(results: Results) -> Iterator[str]:
    claim = results.experiment.claim
    found = claims(results)
    if claim is None:
        return
    passing = [one.method for one in found if one.method not in claim.methods and one.verdict != "fails"]
    if passing:
        yield f"**Cannot be told here**: {passing[0]}, without an adapter, does not fail it."
    for result in found:
        fewer = f", {result.baseline_numbers / result.numbers:.1f} times fewer" if result.numbers else ""
        size = "" if result.small_enough else f", not the {claim.times:g} times claimed"
        yield (
            f"{result.method} **{result.verdict if not passing or result.verdict == 'fails' else 'not decided'}**: {_shown(result.score)} "
            f"against {result.baseline} ({_shown(result.baseline_score)}), paired difference {_shown(result.difference, sign=True)}, margin "
            f"{claim.margin:g}; {result.numbers:,} numbers instead of {result.baseline_numbers:,}{fewer}{size}."
        )
    scored = {row.method.name for row in results.rows if row.test}
    for name in (name for name in (claim.baseline, *claim.methods) if name not in scored):
        yield f"Not checked: {name} has no result."


def _notes(results: Results) -> Iterator[str]:
    for row in results.rows:
        yield from row.failures
    for row in results.rows:
        if row.choice is not None and row.choice.at_edge:
            grid = ", ".join(f"{rate:g}" for rate in row.choice.grid)
            yield f"{row.method.name}: the best rate {row.choice.rate:g} lies at the edge of its grid ({grid})."
    if results.missing:
        yield f"Not done: {'; '.join(results.missing[:5])}{' and others' if len(results.missing) > 5 else ''}."


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "method": row.method.name,
        "family": row.method.family,
        "kind": row.method.kind,
        "options": dict(row.method.options),
        "learning_rate": asdict(row.choice) if row.choice else None,
        "test": {"by_seed": row.test, **(asdict(row.score) if row.score else {})},
        "validation": {"by_seed": row.validation},
        "forgetting": {"by_seed": row.forgetting},
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
        "difference": asdict(found.difference) if found.difference else None,
        "verdict": found.verdict,
    }


def _name(point: Point | None) -> str:
    return point.name if point is not None else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shown(found: Interval | None, sign: bool = False) -> str:
    if found is None:
        return "-"
    form = "+.3f" if sign else ".3f"
    bounds = "" if found.low is None else f" [{found.low:{form}}, {found.high:{form}}]"
    return f"{found.mean:{form}}{bounds}"
