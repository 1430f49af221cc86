"""The judge of the wide world on fresh real drawings of held-out people and of held-out colours.

Words where they are seen, colours in Lab (named ones, free ones, held-out ranges), whether the doubt it gives is right, whether the same
person is known again, and the measure that knows no network. ``python -m benchmarks.judge`` draws everything anew from its seed, takes
about two minutes, and writes results/judge.json and the tables of docs/embedded_world.md.
"""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks._harness import between, write_result
from smidgen.bases.embedded import colors, wide
from smidgen.bases.embedded.judge import as_tensor
from smidgen.bases.embedded.wide_judge import FOLDER, UNSURE, load_wide_judge, nearest_person
from smidgen.lab.embedded_base.judge import spoil

PAGE = Path(__file__).parents[1] / "docs" / "embedded_world.md"
SEED, PEOPLE, CANDIDATES = 20_261, 800, 40


def drawn(split: wide.Split, n: int) -> tuple[list[wide.Identity], list[wide.Scene], list]:
    """Two scenes each of n people of a split, one after the other."""
    rng = np.random.default_rng([SEED, len(split)])
    people = [p for p in (wide.sample_identity(rng, split) for _ in range(n)) for _ in range(2)]
    scenes = [wide.sample_scene(rng, person) for person in people]
    return people, scenes, [wide.render(p, s) for p, s in zip(people, scenes, strict=True)]


def color_figures(people: list, scenes: list, pictures: list, suffix: str = "") -> dict[str, float]:
    """Mean distances in Lab where a colour is seen, by whether it is a word or free; how often one is called unseen; and the share of
    errors within two sigmas (.74 of a Gaussian)."""
    found, sigma = load_wide_judge().colors(pictures)
    figures: dict[str, float] = {}
    for k, name in enumerate(wide.COLORS):
        errors, doubts, within, hidden = {"named": [], "free": []}, [], [], []
        for i, (person, scene) in enumerate(zip(people, scenes, strict=True)):
            record = person if hasattr(person, name) else scene
            color = wide.color_of(record, name)
            if color is None:
                continue
            if not wide.seen(person, scene)[name]:
                hidden.append(sigma[i, k] > UNSURE)
                continue
            error = float(np.linalg.norm(found[i, k].numpy() - colors.lab(color)))
            errors["free" if getattr(record, name).startswith("#") else "named"].append(error)
            doubts.append(bool(sigma[i, k] > UNSURE))
            within.append(error < 2 * sigma[i, k])
        for kind, values in errors.items():
            if values:
                figures[f"{name}_{kind}_lab{suffix}"] = round(float(np.mean(values)), 2)
        figures[f"{name}_within_two_sigma{suffix}"] = round(float(np.mean(within)), 3)
        figures[f"{name}_called_unseen_when_seen{suffix}"] = round(float(np.mean(doubts)), 3)
        if hidden:
            figures[f"{name}_called_unseen_when_hidden{suffix}"] = round(float(np.mean(hidden)), 3)
    return figures


def words(people: list, scenes: list, pictures: list) -> tuple[dict[str, float], Counter]:
    """Shares of words right where seen, and how often each wrong word stood for which."""
    read = load_wide_judge().read(pictures)
    right: dict[str, list[bool]] = {name: [] for name in wide.ATTRIBUTES}
    wrong: Counter = Counter()
    for i, (person, scene) in enumerate(zip(people, scenes, strict=True)):
        codes = {**wide.attribute_codes(person), **wide.attribute_codes(scene)}
        for name, seen in wide.seen(person, scene).items():
            if seen:
                word = list(wide.ATTRIBUTES[name])[codes[name]]
                right[name].append(read[name][i] == word)
                if read[name][i] != word:
                    wrong[(name, word, read[name][i])] += 1
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}, wrong


def nearest_figures(people: list, scenes: list, pictures: list, n: int = 24) -> dict[str, float]:
    """How often the true person is the nearest of `CANDIDATES` people, a quarter of whom differ in one attribute, in spoilt drawings."""
    rng, hits, asked, share = np.random.default_rng(SEED), 0, 0, CANDIDATES // 4
    spoilt = (spoil(as_tensor(pictures[: 2 * n : 2]), torch.Generator().manual_seed(SEED)) + 1) / 2
    for i, picture in zip(range(0, 2 * n, 2), spoilt, strict=True):
        others = [wide.sample_identity(rng, "test") for _ in range(CANDIDATES - share - 1)]
        alike = []
        for other in others[:share]:
            field = list(wide.IDENTITY_ATTRIBUTES)[rng.integers(4)]
            alike.append(replace(people[i], **{field: getattr(other, field)}))
        candidates = [people[i], *alike, *others]
        if scenes[i].hat == "none" and scenes[i].light != "grey":  # there everything that sets them apart is seen
            distances = nearest_person(picture[None], [scenes[i]], candidates)[0]
            same = [k for k, c in enumerate(candidates) if c == people[i]]
            hits += int(distances.argmin()) in same
            asked += 1
    return {"nearest_rank_one": round(hits / asked, 4), "nearest_pictures": asked, "nearest_candidates": CANDIDATES}


def main() -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    people, scenes, pictures = drawn("test", PEOPLE // 2)
    figures: dict[str, float] = {
        "pictures": len(pictures),
        "render_cpu_ms": round((time.process_time() - began) / len(pictures) * 1e3, 2),
    }
    shares, wrong = words(people, scenes, pictures)
    tones = color_figures(people, scenes, pictures)
    away = drawn("range", PEOPLE // 4)
    figures |= {f"word_{name}": share for name, share in shares.items()} | tones
    held = color_figures(*away, "_in_held_ranges")
    figures |= {name: value for name, value in held.items() if name.startswith(wide.FREE)}
    scores = load_wide_judge().identity_score(pictures[0::2], pictures[1::2])
    vectors = load_wide_judge().embed(pictures)
    cosine = vectors[0::2] @ vectors[1::2].T
    apart = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    figures["identity_auc"] = round((cosine.diagonal()[:, None] > apart[None]).float().mean().item(), 4)
    figures["identity_rank_one_of_400"] = round(
        (cosine.argmax(1) == torch.arange(len(cosine))).float().mean().item(), 4
    )
    assert len(scores) == len(cosine)
    figures |= nearest_figures(people, scenes, pictures)
    figures["weight_bytes"] = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    write_result("judge", figures, "python -m benchmarks.judge")
    between(PAGE, "judge", tables(figures, wrong))
    print("\n".join(f"{name} {value}" for name, value in figures.items()))


def tables(figures: dict[str, float], wrong: Counter) -> str:
    """The page's tables."""
    lines = ["| word read right where seen | share |", "|---|---|"]
    lines += [f"| {name} | {figures[f'word_{name}']:.3f} |" for name in wide.ATTRIBUTES]
    lines += [
        "",
        "| colour | named, Lab | free, Lab | held-out ranges, Lab | within two sigma | called unseen: seen / hidden |",
        "|---|---|---|---|---|---|",
    ]
    for name in wide.COLORS:
        cells = [
            figures.get(f"{name}_{kind}")
            for kind in ("named_lab", "free_lab", "free_lab_in_held_ranges", "within_two_sigma")
        ]
        unseen = [figures.get(f"{name}_called_unseen_when_{kind}") for kind in ("seen", "hidden")]
        lines.append(
            f"| {name} | "
            + " | ".join("" if c is None else f"{c:g}" for c in cells)
            + " | "
            + " / ".join("-" if u is None else f"{u:g}" for u in unseen)
            + " |"
        )
    lines += ["", "| most often confused | drawn | read | times |", "|---|---|---|---|"]
    lines += [f"| {name} | {word} | {read} | {count} |" for (name, word, read), count in wrong.most_common(15)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
