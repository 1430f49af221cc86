"""The page, the figures and the contact sheet of ``benchmarks.control``; every finished cell is read again."""

import json
import textwrap
from typing import Any

import numpy as np

from benchmarks import control as bench
from benchmarks._harness import write_result
from smidgen.tasks.png import write_png

SHEET = ("segmentation", "canny", "landmarks")
WORDS = {
    "miou": "mIoU", "aacc": "aACC", "iou": "edge IoU", "f1": "edge F1", "f1_1px": "edge F1 within 1 px",
    "landmarks": "landmark error, px",
}  # fmt: skip
ROWS = ("real", "base", *bench.METHODS)


def report(command: str) -> None:
    """results/control.json, docs/results/control.md and control_sheet.png."""
    rates, found = bench.chosen_rates(), {control: cells(control) for control in bench.CONTROLS}
    figures: dict[str, Any] = {
        "steps": bench.STEPS["segmentation"],
        "pictures": bench.PICTURES,
        "held_out": bench.HELD_OUT,
        "batch": bench.BATCH,
    }
    figures |= {f"{control}_seeds": len(next(iter(rows.values()))) for control, rows in found.items() if rows}
    for control, rows in found.items():
        for method, seeds in rows.items():
            for score in bench.SCORES[control]:
                figures[key(control, method, score)] = float(np.mean([cell[score] for cell in seeds]))
                figures[key(control, method, score, "interval")] = interval(seeds, score)
    for method, seeds in found["segmentation"].items():
        if method in bench.METHODS:
            figures |= {key(method, name): seeds[0][name] for name in ("numbers", "hint_numbers", "bytes")}
            figures[key(method, "cpu_seconds")] = float(np.mean([cell["cpu_seconds"] for cell in seeds]))
        if method in rates:
            figures[key(method, "learning_rate")] = rates[method]
    spent = [json.loads(path.read_text())["cpu_seconds"] for path in bench.CELLS.glob("*/*.json")]
    figures["cpu_hours"] = sum(spent) / 3600
    write_result("control", figures, command)
    folder = bench.ROOT / "docs" / "results"
    (folder / "control.md").write_text(page(figures, found))
    write_png(sheet(found), folder / "control_sheet.png")


def cells(control: str) -> dict[str, list[dict[str, Any]]]:
    """method -> its cells, one for each seed of which every method is done."""
    plan = [cell for cell in bench.plan("run") if cell[0] == control]
    done = [s for s in range(bench.SEEDS) if all(bench.path_of("run", c).exists() for c in plan if c[3] == s)]
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in plan:
        if cell[3] in done:
            found.setdefault(cell[1], []).append(bench.scored(cell))
    return found


def key(*words: str) -> str:
    """One flat name of a figure."""
    text = "_".join(words).lower().replace("*", "_star")
    return "".join(letter if letter.isalnum() else "_" for letter in text).replace("__", "_").strip("_")


def interval(seeds: list[dict[str, Any]], score: str, draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of a cell's score over seeds and held-out pictures.

    What is drawn again is the mean over pictures; its spread is laid around the score over all pictures, as IoU and F1
    of all pictures are not the mean of each one's.
    """
    each = np.array([cell["each"][score] for cell in seeds])
    rng = np.random.default_rng(0)
    rows = rng.integers(len(each), size=(draws, len(each)))
    columns = rng.integers(each.shape[1], size=(draws, each.shape[1]))
    means = np.array([each[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)])
    centre = float(np.mean([cell[score] for cell in seeds])) - each.mean()
    return [float(bound + centre) for bound in np.quantile(means, (0.025, 0.975))]


def page(figures: dict[str, Any], found: dict[str, dict[str, list]]) -> str:
    """docs/results/control.md."""
    from smidgen.bases.embedded.parts_reader import load_parts_reader

    accuracy = load_parts_reader().accuracy
    done = {control: rows for control, rows in found.items() if rows}
    missing = [control for control in bench.CONTROLS if control not in done]
    setting = f"""A hint encoder ({figures["lora_r4_hint_numbers"]:,} numbers, the same for every method, saved with the
    adapter) and an adapter in the UNet's attentions learn to follow control pictures: {bench.PICTURES:,} portraits in
    random poses, {bench.STEPS["segmentation"]} steps of {bench.BATCH}. Scored on {bench.HELD_OUT} portraits of people
    nobody trained on, {bench.DRAW_STEPS} sampling steps, guidance {bench.GUIDANCE:g}. Every method saw the same pictures,
    noise, timesteps and number of steps. Rates: two values each, a factor of 3 apart, by the loss on other people after
    {bench.TUNING_STEPS} steps of another seed, chosen on segmentation and used for all controls; the hint encoder's is
    {bench.HINT_RATE:g} everywhere. The best rate was the larger one for {_at_the_edge(figures)}, so a longer search might
    find better ones."""
    words = f"""The ranks keep the paper's ratios of trained numbers to LoRA r=4 (SD 1.5), not its ranks: at widths of 64 to
    128 TLoRA(2,6) has 1.7 times LoRA's numbers, on SD 1.5 half of them. "real" are the true pictures after the base's
    autoencoder, which no method can be expected to beat; "base" draws from the caption alone; "hint alone" trains no
    adapter. Brackets: 95 % bootstrap over seeds and pictures. Parts and landmarks are read by a network trained on real
    drawings only; on drawings of held-out people it reaches mIoU {accuracy["miou"]:.3f}, aACC {accuracy["pixels"]:.3f}
    and {accuracy["landmarks"]:.2f} px."""
    redo = f"""`make bench NAME=control` redoes it ({figures["cpu_hours"]:.1f} hours of one core for all that is here); cells
    that are done are kept."""
    parts = ["# Control on the embedded base, by method\n", *(_filled(text) + "\n" for text in (setting, words, redo))]
    parts.append(_sizes(figures) + "\n")
    for control, rows in done.items():
        title = f"## {control}, {_counted(figures[f'{control}_seeds'])}"
        parts.append(f"{title}\n\n{_table(figures, control, list(rows))}\n")
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}; the command above does them.\n")
    parts += [_against(done), "![control pictures, real pictures and what each method drew](control_sheet.png)\n"]
    return "\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _counted(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _at_the_edge(figures: dict[str, Any]) -> str:
    edge = [m for m, grid in bench.GRIDS.items() if figures[key(m, "learning_rate")] == max(grid)]
    return "every method" if len(edge) == len(bench.GRIDS) else ", ".join(edge) or "none"


def _sizes(figures: dict[str, Any]) -> str:
    from smidgen.tasks import cards

    head = ["method", "trained numbers", "of LoRA r4", "published ratio", "CPU s a run", "learning rate"]
    rows = []
    for method in bench.METHODS:
        numbers = figures[key(method, "numbers")]
        ratio, published = numbers / figures[key("LoRA r4", "numbers")], bench.PUBLISHED.get(method)
        rate = figures.get(key(method, "learning_rate"))
        told = [f"{published:.2f}" if published else "-", f"{figures[key(method, 'cpu_seconds')]:.0f}"]
        rows.append([method, f"{numbers:,}", f"{ratio:.2f}", *told, f"{rate:g}" if rate else "-"])
    return cards.table(head, rows)


def _table(figures: dict[str, Any], control: str, methods: list[str]) -> str:
    from smidgen.tasks import cards

    rows = []
    for method in methods:
        row = [method]
        for score in bench.SCORES[control]:
            low, high = figures[key(control, method, score, "interval")]
            row.append(f"{figures[key(control, method, score)]:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(row)
    return cards.table(["method", *(WORDS[score] for score in bench.SCORES[control])], rows)


def _against(done: dict[str, dict[str, list]]) -> str:
    """How each method stands against LoRA r=4 on each control."""
    from smidgen.tasks import cards

    rows = []
    for method in [name for name in bench.METHODS if name != "LoRA r4"]:
        row = [method]
        for control, cells_of in done.items():
            score, sign = bench.MAIN[control], -1 if control == "landmarks" else 1
            each = [np.array([cell["each"][score] for cell in cells_of[name]]) for name in (method, "LoRA r4")]
            gap = sign * (each[0] - each[1])
            low, high = interval([{score: part.mean(), "each": {score: part}} for part in gap], score)
            word = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
            row.append(f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}] {word}")
        rows.append(row)
    head = ["method", *(f"{control}, {WORDS[bench.MAIN[control]]}" for control in done)]
    told = "Differences picture by picture, same seed and noise, averaged; plus is better; 95 % bootstrap."
    return f"## Against LoRA r=4\n\n{told}\n\n{cards.table(head, rows)}\n"


def sheet(found: dict[str, dict[str, list]]) -> Any:
    """For each control: its pictures, the real pictures, and each method's first ones of the first seed."""
    from PIL import Image

    from smidgen.tasks.contact_sheet import Row, contact_sheet

    kept, shown = bench.stored()["test"], slice(bench.COLUMNS)
    parts = []
    for control in SHEET:
        if not found[control]:
            continue
        controls = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in kept[control][shown]]
        real = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in kept["pixels"][shown]]
        rows = [Row("control", controls), Row("real picture", real)]
        for method in ROWS[1:]:
            cell = found[control][method][0]
            score = bench.MAIN[control]
            rows.append(Row(method, bench.unpacked(cell["pictures"])[shown], f"{WORDS[score]} {cell[score]:.3f}"))
        parts.append(contact_sheet(f"{control}: the same caption and noise in each column", rows, cell=96))
    width, height = max(part.width for part in parts), sum(part.height for part in parts)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole
