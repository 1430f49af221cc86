"""What a predicted adapter costs, against training one until it is as much the person.

    python -m benchmarks.predict

For held-out people of the embedded world, in one run: seconds from photo to adapter folder (encoders, network, decoding,
writing; all models are loaded), and seconds of ``personalize``'s default training until the identity score of pictures drawn
with its adapter reaches that of the prediction's, looked at every few steps (drawing and scoring are not counted). Training
sees the same photo, and in a second contest all of the person's pictures. Who does not get there within the cap counts with
the cap, so ratios are then lower bounds; how many got there is printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import smidgen
from benchmarks._harness import write_result
from smidgen.bases.families import load_base
from smidgen.difflora.generator.generator import Generator, load_generator
from smidgen.difflora.weightspace.layout import write_adapter
from smidgen.difflora.zoo.settings import Subjects, ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.subjects import make_subjects
from smidgen.lab.audit.scenes import AuditScenes, scenes_seed
from smidgen.lab.audit.settings import Drawing
from smidgen.tasks.data.images import Picture, load_picture
from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples
from smidgen.tasks.personalize.settings import PRESETS
from smidgen.training.loop import train
from smidgen.training.randomness import derive

PICTURES = 8


class Reached(Exception):
    """The score is there."""


class Clock:
    """Processor and wall seconds since it was made, less those spent in ``pause``."""

    def __init__(self) -> None:
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()

    def read(self) -> tuple[float, float]:
        return self.cpu + time.process_time(), self.wall + time.perf_counter()

    def pause(self, run: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        found = run()
        self.cpu -= time.process_time() - cpu
        self.wall -= time.perf_counter() - wall
        return found


def people(folder: Path, count: int) -> list[list[Picture]]:
    """Pictures of held-out people."""
    made = make_subjects(folder, Subjects(people=1, held_out=count, pictures=PICTURES, people_seed=7))
    size = load_picture(folder / made[-1].pictures[0], 64).size
    return [
        [Picture(folder / path, text, size, digest) for path, text, digest in zip(p.pictures, p.captions, p.digests, strict=True)]
        for p in made
        if p.split == "test"
    ]  # fmt: skip


def predict_seconds(generator: Generator, photos: Sequence[Any], unet: nn.Module, threads: int) -> tuple[float, float]:
    """Median (processor, wall) seconds from photo to adapter folder."""
    torch.set_num_threads(threads)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number, photo in enumerate([photos[0], *photos]):  # the first warms
            clock = Clock()
            write_adapter(generator.layout, generator.predict([photo])[0], unet, Path(folder) / str(number))
            taken.append(clock.read())
    cpu, wall = zip(*taken[1:], strict=True)
    return statistics.median(cpu), statistics.median(wall)


def train_until(
    target: float, pictures: Sequence[Picture], own: Sequence[Any], drawing: Drawing, every: int, cap: int
) -> tuple[bool, int, float, float]:
    """(reached, steps, processor seconds, wall seconds) of training an adapter until ``target`` identity."""
    chosen = PRESETS["default"]
    recipe = ZooConfig(adapter=chosen.adapter, train=chosen.train)
    base = load_base(recipe.base)
    encoded = encode_examples(base, pictures, [picture.caption for picture in pictures], base.resolution)
    task = PersonalizeTask(encoded, base, chosen.data.train_batch_size, recipe.train.seed)
    judged = scorer(base, drawing)
    smidgen.adapt(base.model, replace(adapter_config(recipe), target_modules=set(base.targets)))
    rate = rates(recipe)
    groups = smidgen.parameter_groups(base.model, lr=rate.residual, transform_lr=rate.transform)
    clock, seen = Clock(), {"steps": 0, "cpu": 0.0, "wall": 0.0}

    def look(model: nn.Module, step: int, folder: Path) -> None:
        seen["steps"], (seen["cpu"], seen["wall"]) = step, clock.read()
        model.eval()
        score = clock.pause(lambda: judged(own))
        model.train()
        if score >= target:
            raise Reached
        if step >= cap:
            raise TimeoutError

    task.previewer = look
    loop = replace(recipe.train, preview_steps=every, checkpointing_steps=10 * recipe.train.max_train_steps)
    reached = False
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(task, base.model, groups, loop, folder, progress=False)
        except Reached:
            reached = True
        except TimeoutError:
            pass
    return reached, int(seen["steps"]), seen["cpu"], seen["wall"]


def scorer(base: Any, drawing: Drawing) -> Callable[[Sequence[Any]], float]:
    """Draws with whatever adapter is on and scores by somebody's own pictures; scenes and noise of an audit of seed 0."""
    judge, seed = base.judge(), scenes_seed(0)
    assert judge is not None
    texts = judge.prompts(drawing.scenes, seed)
    prompts, negative = base.encode_prompts(texts), base.encode_prompts([""])
    seeds = [derive(seed, "gate", number) for number in range(len(texts))]
    how: dict[str, Any] = {"steps": drawing.inference_steps, "guidance": drawing.guidance_scale}

    def identity(own: Sequence[Any]) -> float:
        return judge.scores(base.draw(prompts, seeds, negative=negative, **how), texts, own)["identity"]

    return identity


def main() -> None:
    """Runs everything and writes benchmarks/results/predict.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--generator", default=None, help="folder; the shipped one when left out")
    parser.add_argument("--cap", type=int, default=250, help="steps of training at most")
    parser.add_argument("--every", type=int, default=10, help="steps between looks at the score")
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    drawing, generator = Drawing(unrelated=()), load_generator(args.generator)
    with tempfile.TemporaryDirectory() as scratch:
        everybody = people(Path(scratch), args.people)
        scenes = AuditScenes(generator.base, generator.layout, None, drawing, 0)
        side = scenes.pipeline.base.resolution
        loaded = [[load_picture(picture.path, side) for picture in own] for own in everybody]
        photos, plain = [own[0] for own in loaded], load_base(generator.base).model
        figures: dict[str, float] = {"people": len(photos), "numbers": generator.layout.size}
        for threads in (1, 2):
            cpu, wall = predict_seconds(generator, photos, plain, threads)
            figures |= {f"predict_cpu_seconds_{threads}_threads": cpu, f"predict_wall_seconds_{threads}_threads": wall}
        torch.set_num_threads(args.threads)
        rows = torch.cat([generator.predict([photo]) for photo in photos])
        drawn = scenes.draw(rows)
        targets = [scenes.scores(p, own[1:])["identity"] for p, own in zip(drawn, loaded, strict=True)]
        figures["predict_identity"] = statistics.mean(targets)
        for name, shown in (("same_photo", 1), ("all_pictures", PICTURES)):
            runs = [
                train_until(target, pictures[:shown], own[1:], drawing, args.every, args.cap)
                for target, pictures, own in zip(targets, everybody, loaded, strict=True)
            ]
            reached, steps, cpu_seconds, wall_seconds = zip(*runs, strict=True)
            figures |= {
                f"{name}_reached": sum(reached),
                f"{name}_steps": statistics.median(steps),
                f"{name}_cpu_seconds": statistics.median(cpu_seconds),
                f"{name}_wall_seconds": statistics.median(wall_seconds),
                f"{name}_cpu_ratio": statistics.median(cpu_seconds)
                / figures[f"predict_cpu_seconds_{args.threads}_threads"],
                f"{name}_wall_ratio": statistics.median(wall_seconds)
                / figures[f"predict_wall_seconds_{args.threads}_threads"],
            }
    figures = {name: round(value, 5) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:35} {value}")
    if not args.no_write:
        command = f"python -m benchmarks.predict --people {args.people} --cap {args.cap} --every {args.every}"
        write_result("predict", figures, command)


if __name__ == "__main__":
    main()
