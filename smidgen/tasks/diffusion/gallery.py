"""Draw the same scenes with the base and with each adapter, from the same noise; score them and lay them on one
sheet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from smidgen.adapters import api
from smidgen.adapters.checkpoint.files import public_name
from smidgen.bases.judging import Judge
from smidgen.bases.protocol import ImageBase, Prompts, Size
from smidgen.errors import AdapterFileError
from smidgen.tasks.contact_sheet import Row, contact_sheet
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.png import write_png
from smidgen.tasks.report import Entry
from smidgen.training.fitting import Fitted, prove


@dataclass(frozen=True)
class Gallery:
    """The sheet, one line of the report for each row of drawn pictures, and what was proved of the first adapter."""

    sheet: Image.Image
    entries: tuple[Entry, ...]
    proof: tuple[str, ...]


def gallery(
    load: Callable[[], ImageBase],
    runs: Sequence[Fitted],
    scenes: Scenes,
    asked: Sequence[str],
    subject: Sequence[Image.Image],
    judge: Judge | None,
    references: Sequence[Sequence[Image.Image]],
    owners: Sequence[int] = (),
) -> Gallery:
    """Prove each run's file on a fresh base that ``load`` gives, and draw ``scenes`` with it. ``asked`` are their prompts as a
    judge knows them, ``subject`` holds all own pictures, ``references`` those of each subject that the judge can read; ``owners`` says whom each
    scene shows (empty: the only one)."""
    owners = owners or [0] * len(asked)
    rows: list[tuple[Entry, list[Image.Image]]] = []
    entries: list[Entry] = []
    proof: tuple[str, ...] = ()
    for run in runs:
        fresh = load()
        draw, prompt = scenes.drawn_by(fresh), fresh.encode_prompts(scenes.prompts[:1])
        fresh.release_encoders(keep_vae=True)
        whole = fresh.pipe if fresh.reads_live else fresh.model
        said = prove(whole, run.folder, partial(answer, fresh, prompt, scenes.size or fresh.resolution))
        if not rows:
            proof = said
            with api.disabled(whole):
                images = draw()
            entries.append(_entry(Entry("base model", 0, 0), images, asked, references, owners, judge))
            rows.append((entries[-1], images))
        images = draw()
        _check_difference(rows[0][1], images, run)
        last = sum(run.losses[-20:]) / len(run.losses[-20:])
        entry = Entry(run.name, run.trained_numbers, run.bytes, run.seconds, final_loss=last)
        entries.append(_entry(entry, images, asked, references, owners, judge))
        rows.append((entries[-1], images))
    return Gallery(_sheet(rows, scenes, subject, fresh.name), tuple(entries), proof)


def previewer(base: ImageBase, scenes: Scenes, most: int = 4) -> Callable[[nn.Module, int, Path], None]:
    """What a run calls to draw the first scene of at ``most`` so many prompts as ``preview-<step>.png``; they are encoded now."""
    few = scenes.first(most)
    draw = few.drawn_by(base)

    def preview(model: nn.Module, step: int, folder: Path) -> None:
        save_preview(model, step, folder, lambda: [Row(f"step {step}", draw())], few.prompts, **few.facts)

    return preview


def save_preview(
    model: nn.Module,
    step: int,
    folder: Path,
    rows: Callable[[], Sequence[Row]],
    columns: Sequence[str] = (),
    **facts: Any,
) -> None:
    """Draws ``rows`` with ``model`` in eval mode, as ``preview-<step>.png`` with ``facts``."""
    was_training = model.training
    model.eval()
    facts = {"shows": f"the adapter after step {step}"} | facts
    write_png(contact_sheet(f"after step {step}", rows(), columns), folder / f"preview-{step}.png", facts)
    model.train(was_training)


def answer(base: ImageBase, prompts: Prompts, size: Size) -> torch.Tensor:
    """What the denoiser predicts for fixed noise in the middle of its schedule."""
    noise = torch.randn(1, *base.latent_shape(size), generator=torch.Generator().manual_seed(0))
    timesteps = base.schedule.timesteps(torch.tensor([0.5])).to(base.device)
    where = base.device, base.model.dtype
    return base.predict(base.model, noise.to(*where), timesteps, prompts[:1].to(*where))


def _entry(
    entry: Entry,
    images: Sequence[Image.Image],
    asked: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
    owners: Sequence[int],
    judge: Judge | None,
) -> Entry:
    """``entry`` with its scores: the mean over subjects, of several also the likeness to the others, who are not meant."""
    if judge is None:
        return entry
    found: dict[str, list[float]] = {}
    for subject, own in enumerate(references):
        where = [at for at, owner in enumerate(owners) if owner == subject]
        told = [images[at] for at in where], [asked[at] for at in where]
        scores = dict(judge.scores(*told, own))
        others = [
            judge.scores(*told, other)["identity"] for number, other in enumerate(references) if number != subject
        ]
        scores |= {"identity of others": sum(others) / len(others)} if others else {}
        for name, score in scores.items():
            found.setdefault(name, []).append(score)
    scores = {name: sum(values) / len(values) for name, values in found.items()}
    return replace(entry, identity=scores.pop("identity", None), caption=scores.pop("caption", None), details=scores)


def _check_difference(before: Sequence[Image.Image], after: Sequence[Image.Image], run: Fitted) -> None:
    if all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True)):
        raise AdapterFileError(f"{run.folder} draws exactly what the base draws: the adapter changes no pixel.")


def _sheet(
    rows: Sequence[tuple[Entry, list[Image.Image]]], scenes: Scenes, subject: Sequence[Image.Image], base: str
) -> Image.Image:
    across = min(8, len(scenes.prompts))
    shown = [Row("the subject", list(subject)[:across], f"{len(subject)} pictures")]
    for entry, images in rows:
        note = f"{entry.bytes_on_disk / 1000:.1f} kB" if entry.bytes_on_disk else ""
        scores = {"identity": entry.identity, "captions": entry.caption}
        note += "".join(f" {name} {score:.2f}" for name, score in scores.items() if score is not None)
        shown.append(Row(entry.name, images[:across], note.strip()))
    return contact_sheet(
        f"{rows[1][0].name} on {public_name(base)}: same noise in each column", shown, scenes.prompts[:across]
    )
