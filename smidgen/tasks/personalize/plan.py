"""What a personalisation will need, said before it is run: trained parameters, memory by part, disk, seconds a step.

    plan = make_plan(PersonalizeConfig(base="flux2-dev", adapter=Adapter("svfit")))
    fitting(config, 24e9)    # the nearest settings that fit

The denoiser, its adapter and the loss are those of the run, on the meta device: bytes and operations are counted, everything else is
sums. What was not counted but assumed is in ``ASSUMED``, which every plan prints.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.tuner.coverage import Coverage, coverage
from smidgen.bases.families import load_base
from smidgen.bases.pipelines import at_once, default_device, quantization
from smidgen.bases.protocol import ImageBase, Prompts, Size, sides
from smidgen.bases.shapes import CLIP_TOKENS, Shapes, shapes_of
from smidgen.errors import ConfigError
from smidgen.tasks.data.buckets import parse_shape
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from smidgen.tasks.personalize.recipe import adapter_setup, in_steps, text_adapters
from smidgen.tasks.personalize.settings import PersonalizeConfig, rates
from smidgen.tasks.personalize.subjects import read_subjects
from smidgen.training import engine
from smidgen.training.cost import ADAM, CARDS, Cost, checkpointed, cost
from smidgen.training.fitting import fit

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BITS = {
    "nf4": 4.5,
    "int8": 8.0,
    "int8-torchao": 8.0,
    "fp8": 8.0,
}  # of a number of a quantised layer, nf4 with its scales (32 / 64)
PICTURES = 20  # of a subject, where no folder is given
DRAWN = 8  # images at once at the end, each with its guidance
SMALL = 2e8  # parameters of a denoiser whose steps are tried rather than counted
LONGEST = 20.0  # seconds that trying steps may take, beyond two of them
KEPT = 1.4  # bytes of a processor's memory for one of activations: scratch of its kernels, and what its allocator does not give back
SHARE, CONTEXT = 0.92, 0.6e9  # of a card's memory that can be used; bytes that CUDA takes
UTILISATION = 0.35  # share of a card's peak that training reaches
ASSUMED = (
    f"{ADAM} bytes for a trained parameter (value, gradient and two moments in fp32)",
    "fused attention; text encoders in the run's precision, the VAE in fp32; only linear layers (and with fp8 convolutions) are "
    "quantised, their 4- and 8-bit weights are made whole one layer at a time",
    f"{PICTURES} pictures where no folder is given, square, and {DRAWN} drawn at a time",
    f"on a processor {KEPT:g} bytes for one of activations (kernels' scratch and what the allocator keeps; found on the embedded UNet)",
    f"on a card {1 - SHARE:.0%} lost to fragments and {CONTEXT / 1e9:g} GB to CUDA; {UTILISATION:.0%} of its peak reached",
)


@dataclass(frozen=True)
class Plan:
    """One run's needs, bytes throughout.

    Attributes:
        config: the run's settings.
        shapes: its base.
        resolution: pixels on a side.
        trained, parameters: of the adapter, and of the denoiser.
        covered: which layers and blocks the adapter is on.
        step: operations and activations of one step of the whole batch.
        encoding, training, drawing: memory by part while the run does this; what is biggest decides.
        disk: by what is written, and the base's own files.
        steps: of the optimizer, as told or as the epochs take.
        process: memory of the program itself, before any model (None: not measured).
        seconds: of one step, measured on this machine (None: counted alone).
        card: whether it is for a GPU, whose fragments count.
    """

    config: PersonalizeConfig
    shapes: Shapes
    resolution: int
    trained: int
    parameters: int
    covered: Coverage
    step: Cost
    encoding: dict[str, float]
    training: dict[str, float]
    drawing: dict[str, float]
    disk: dict[str, float]
    steps: int
    process: float | None = None
    seconds: float | None = None
    card: bool = True

    @property
    def peak(self) -> float:
        """Most bytes at a time, with the program's own."""
        phases = self.encoding, self.training, self.drawing
        if self.card:
            return max(sum(part.values()) for part in phases) / SHARE + CONTEXT
        most = max(
            sum(v * (KEPT if name.startswith("activations") else 1) for name, v in part.items()) for part in phases
        )
        return most + (self.process or 0.0)

    @property
    def lasting(self) -> float:
        """What of the peak does not depend on how large images are, or little."""
        phases = self.encoding, self.training, self.drawing
        return max(sum(v for name, v in part.items() if not name.startswith("activations")) for part in phases)

    def counted_seconds(self) -> dict[str, float]:
        """Seconds a step on each card, from its operations and the share of its peak that is assumed."""
        half = self.config.train.mixed_precision != "no"
        flops = self.step.forward + self.step.training
        return {card.name: flops / (UTILISATION * (card.peak if half else card.single)) for card in CARDS}


def make_plan(config: PersonalizeConfig, card: bool | None = None, measured: bool = True) -> Plan:
    """The plan of a run of ``config``.

    Args:
        config: the run's settings; ``base`` may also be a published base's name.
        card: plan for a GPU; None: where this machine would train, and a GPU for a base that is not on it.
        measured: also try steps, and weigh the program, where the base is on this machine and small.

    Raises:
        ConfigError: no such base, or settings that cannot be.
    """
    shapes = shapes_of(config.base, config.base_config)
    if config.quantize not in (None, *BITS):
        quantization(config.quantize, torch.float32)  # refuses it; the libraries of others need not be here to plan
    here = bool(shapes.folder)
    steps, pictures = _amount(config, shapes)
    card = (not here or default_device().type != "cpu") if card is None else card
    counted = _counted(shapes, config)
    small = here and counted.parameters < SMALL and measured and not card
    return replace(
        _plan(config, shapes, counted, pictures, steps), card=card,
        process=_process(shapes.pipeline) if measured and not card else None,
        seconds=seconds(config) if small else None,
    )  # fmt: skip


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counted:
    resolution: int
    trained: int
    parameters: int
    linear: int  # parameters of layers that are quantised
    buffers: int  # bytes of what the denoiser holds besides parameters (SD3: its grid of positions)
    frozen: int  # bytes that an adapter keeps besides what it trains
    covered: Coverage
    step: Cost
    texts: Cost  # of the text encoders beside each step, where they are trained
    latent: int  # numbers of an image's latents
    prompt: int  # numbers of an encoded prompt
    waits: bool


def _decisive(config: PersonalizeConfig) -> PersonalizeConfig:
    """``config`` without what no count of given rows depends on, so that a count is made once."""
    train = replace(type(config.train)(), mixed_precision=config.train.mixed_precision)
    data = type(config.data)(resolution=config.data.largest)
    return type(config)(
        data,
        config.adapter,
        train,
        base=config.base,
        base_config=config.base_config,
        gradient_checkpointing=config.gradient_checkpointing,
    )


@dataclass(frozen=True)
class _Ends:
    """What does not depend on the adapter: bytes of activations of drawing, encoding and decoding, the VAE's parameters."""

    drawn: int
    encoded: int
    decoded: int
    vae: int


@lru_cache(maxsize=256)
def _ends(name: str, made: str | None, size: int, shown: Size, precision: torch.dtype) -> _Ends:
    shapes = shapes_of(name, made)
    base = shapes.base()
    nn.Module.to(base.model, precision)
    rows = _counted_rows(base.model, 2 * DRAWN)
    drawn = _forward(base, _batch(base, shapes, rows, shown, precision), precision) * 2 * DRAWN // rows
    return _Ends(drawn, *_vae(base, size, shown))


def _counted_rows(model: nn.Module, rows: int) -> int:
    """Rows of a large denoiser cost the same each: one is counted, and multiplied."""
    return rows if _numbers(model) < SMALL else 1


@lru_cache(maxsize=256)
def _count(config: PersonalizeConfig, rows: int) -> _Counted:
    """The count of ``rows`` images."""
    shapes, precision = shapes_of(config.base, config.base_config), DTYPES[config.train.mixed_precision]
    base = shapes.base()
    size = config.data.largest or shapes.pixels or base.resolution
    model: Any = base.model
    nn.Module.to(model, precision).train()  # diffusers would speak of layers kept in fp32
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    parameters = _numbers(model)
    before = _bytes(model)
    buffers = before - sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing(checkpointed(precision))
    targets = list(config.adapter.target_modules or base.targets)
    trained, frozen = _adapted(model, adapter_setup(config, config.adapter.method, targets), before)
    task = PersonalizeTask(
        Encoded(torch.empty(1), torch.empty(1), Prompts({}), ()),
        base,
        batch_size=rows,
        snr_gamma=config.adapter.snr_gamma,
    )
    at_once = _counted_rows(model, rows)
    batch = _batch(base, shapes, at_once, size, precision)
    step = cost(lambda: task.errors(model, batch).sum(), precision=precision)
    step = _times(step, rows, at_once)
    prompt = sum(value[0].numel() for value in batch["prompts"].tensors.values())
    texts = Cost(0, 0, 0)
    if config.adapter.train_text_encoder:
        more, beside, texts = _text_adapters(config, shapes, base, rows)
        trained, frozen = trained + more, frozen + beside
    return _Counted(
        size, trained, parameters, linear, buffers, frozen, coverage(model, engine.NAME), step, texts,
        batch["latents"][0].numel(), prompt, getattr(base, "waits", False),
    )  # fmt: skip


def _adapted(model: nn.Module, setup: Any, before: int) -> tuple[int, int]:
    """Puts an adapter into a model of ``before`` bytes: parameters trained, and bytes of what it keeps besides."""
    engine.adapt(model, setup, ())
    trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
            parameter.data = parameter.data.float()
    return trained, _bytes(model) - before - 4 * trained


def _text_adapters(config: PersonalizeConfig, shapes: Shapes, base: ImageBase, rows: int) -> tuple[int, int, Cost]:
    """The same of all text encoders, and what encoding ``rows`` prompts of one chunk costs with them."""
    trained = frozen = 0
    costs, precision = [], DTYPES[config.train.mixed_precision]
    for name, encoder in shapes.text_encoders().items():
        setattr(base.pipe, name, encoder.to(precision).requires_grad_(False))
    ids = torch.zeros(rows, CLIP_TOKENS, dtype=torch.long, device="meta")
    for own in text_adapters(config, config.adapter.method, base).values():
        model: Any = own.model
        more, beside = _adapted(model, own.peft_config, _bytes(model))
        trained, frozen = trained + more, frozen + beside
        words = ids[:, : model.config.max_position_embeddings]
        costs.append(cost(lambda model=model, words=words: model(words)[0].sum(), precision=precision))  # type: ignore[misc]
    each = zip(*((found.forward, found.training, found.bytes) for found in costs), strict=True)
    return trained, frozen, Cost(*map(sum, each))


def _counted(shapes: Shapes, config: PersonalizeConfig) -> _Counted:
    """The count of a run's rows; of a published base that of one image, which serves for batches of all sizes."""
    rows = _rows(config)
    counted = rows if shapes.folder else 1
    found = _count(_decisive(config), counted)
    step, texts = _times(found.step, rows, counted), _times(found.texts, rows, counted)
    if config.data.preservation:  # these rows are also answered by the base, without gradients
        step = replace(step, forward=step.forward + step.forward * config.data.train_batch_size // rows)
    return replace(found, step=step, texts=texts)


def _rows(config: PersonalizeConfig) -> int:
    """Images of a batch, those of the class and the subject's once more, whose answers are kept, with them."""
    rows = config.data.train_batch_size
    return rows * (1 + bool(config.data.preservation)) + max(1, rows // 2) * config.data.with_prior_preservation


def _times(step: Cost, rows: int, counted: int) -> Cost:
    return Cost(*(value * rows // counted for value in (step.forward, step.training, step.bytes)))


def _batch(base: ImageBase, shapes: Shapes, rows: int, size: Size, precision: torch.dtype) -> dict[str, Any]:
    latents = torch.empty(rows, *base.latent_shape(size), device="meta")
    found: dict[str, Tensor] = {}
    for name, shape in base.prompt_shapes(base.model, shapes.tokens).items():
        mask = name == "mask"  # which lists are cut by: its numbers are asked for
        found[name] = (
            torch.ones(rows, *shape, dtype=torch.bool)
            if mask
            else torch.empty(rows, *shape, device="meta", dtype=precision)
        )
        found[name] = found[name] if base.family == "z-image" or not mask else found[name].to("meta")
    level, weight = torch.zeros(rows, device="meta"), torch.ones(rows, device="meta")
    return {"latents": latents, "noise": latents, "prompts": Prompts(found), "levels": level, "weights": weight}


def _forward(base: ImageBase, batch: dict[str, Any], precision: torch.dtype) -> int:
    """Bytes alive while a batch is drawn."""
    times = base.schedule.timesteps(batch["levels"])
    with torch.no_grad():
        run = lambda: base.predict(base.model, batch["latents"], times, batch["prompts"]).sum()  # noqa: E731
        return cost(run, backward=False, precision=precision).bytes


def _vae(base: ImageBase, size: int, shown: Size) -> tuple[int, int, int]:
    """Bytes of activations of encoding and of decoding as many images as are taken at once, and the VAE's parameters."""
    vae: Any = base.encoders["vae"]
    pixels = base._frames(torch.empty(at_once(4, size**2), 3, size, size, device="meta"))  # type: ignore[attr-defined]
    drawn = torch.empty(at_once(4, prod(sides(shown))), *base.latent_shape(shown), device="meta")
    latents = base._unfolded(drawn)  # type: ignore[attr-defined]

    def ends(run: Callable[[], Tensor]) -> int:
        with torch.no_grad():
            return cost(run, backward=False, precision=torch.float32).bytes

    encoded = ends(lambda: vae.encode(pixels, return_dict=False)[0].mode().sum())
    return encoded, ends(lambda: vae.decode(latents, return_dict=False)[0].sum()), _numbers(vae)


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


# ---- sums -----------------------------------------------------------------------------------------------------------


def _plan(config: PersonalizeConfig, shapes: Shapes, found: _Counted, pictures: int, steps: int) -> Plan:
    precision = DTYPES[config.train.mixed_precision]
    asked = config.show.preview_size
    shown = found.resolution if asked is None else parse_shape(asked, _grid(config.base, config.base_config)[1])
    width, ends = precision.itemsize, _ends(config.base, config.base_config, found.resolution, shown, precision)
    bits = BITS.get(config.quantize or "", 8 * width)
    denoiser = {"denoiser": found.linear * bits / 8 + (found.parameters - found.linear) * width + found.buffers}
    vae, texts = {"VAE": 4.0 * ends.vae}, {"text encoders": width * float(sum(shapes.texts.values()))}
    caches = {"latents and prompts": pictures * (8.0 * found.latent + width * found.prompt)}
    adapter = {"adapter's frozen factors": float(found.frozen), "adapter and optimizer": 12.0 * found.trained}
    first = {} if found.waits else denoiser
    encoding = first | texts | vae | caches | {"activations of the VAE": float(ends.encoded)}
    previews = vae if config.train.preview_steps else {}
    live = texts if config.adapter.train_text_encoder else {}
    activations = {"activations and gradients": float(found.step.bytes + found.texts.bytes)}
    training = denoiser | adapter | caches | previews | live | activations
    fresh = {"adapter's frozen factors": float(found.frozen), "adapter": 4.0 * found.trained}
    drawn = {"activations of drawing": float(max(ends.drawn, ends.decoded))}
    drawing = denoiser | vae | ({} if found.waits else texts) | fresh | caches | drawn
    checkpoints = min(config.train.checkpoints_total_limit, -(-steps // config.train.checkpointing_steps))
    disk = {"the adapter": 4.0 * found.trained, f"{checkpoints} checkpoints": 12.0 * found.trained * checkpoints}
    disk["the base's files in 16 bits"] = 2.0 * (found.parameters + ends.vae + sum(shapes.texts.values()))
    step = Cost(*(getattr(found.step, name) + getattr(found.texts, name) for name in ("forward", "training", "bytes")))
    return Plan(
        config, shapes, found.resolution, found.trained, found.parameters, found.covered, step, encoding, training,
        drawing, disk, steps,
    )  # fmt: skip


def _amount(config: PersonalizeConfig, shapes: Shapes) -> tuple[int, int]:
    """Steps, which may be told in epochs, and how many examples are encoded: as the run will read them."""
    data = config.data
    if data.folder is not None and not data.folder.exists():
        raise ConfigError(f"There is no folder {str(data.folder)!r}; leave it out to plan for {PICTURES} pictures.")
    if not data.source:
        epochs, batch = data.num_train_epochs, data.train_batch_size * config.train.gradient_accumulation_steps
        return config.train.max_train_steps if epochs is None else -(-epochs * PICTURES // batch), PICTURES
    prompted = replace(data, instance_prompt=data.instance_prompt or "a picture")
    found = read_subjects(prompted, *_grid(config.base, config.base_config))
    return in_steps(config, found).train.max_train_steps, sum(map(len, found.shapes.values()))


@lru_cache(maxsize=256)
def _grid(name: str, made: str | None) -> tuple[int, int]:
    """Pixels on a side that a base is trained at, and what sides are multiples of."""
    shapes = shapes_of(name, made)
    base = shapes.base()
    return shapes.pixels or base.resolution, base.step


# ---- this machine ---------------------------------------------------------------------------------------------------

_WEIGH = """
import sys, tempfile
import matplotlib.pyplot, resource
from pathlib import Path
from diffusers import {pipeline}
from smidgen.bases.families import load_base
from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.personalize import plan, settings
small = settings.PersonalizeConfig(settings.Data(train_batch_size=1), settings.Adapter("lora"))
plan.seconds(small)  # on the base that ships with the program, whose weights are taken off again
base = load_base(small.base)
weights = sum(p.numel() * p.element_size() for part in (base.model, *base.encoders.values()) for p in part.parameters())
with tempfile.TemporaryDirectory() as folder:
    loss_plot(dict(weighed=[1.0, 0.5]), Path(folder) / "loss.png")
try:  # the most that this program had; ru_maxrss also knows of who started it
    most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
except OSError:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
print(int(most) * 1024 - weights)
"""


@cache
def _process(pipeline: str) -> float:
    """Bytes of the program without models: a process that takes steps of one image on the embedded base, less its weights."""
    told = subprocess.run([sys.executable, "-c", _WEIGH.format(pipeline=pipeline)], capture_output=True, text=True)
    if told.returncode:
        raise ConfigError(f"The process that weighs the program did not end well: {told.stderr[-300:]}")
    return float(told.stdout.split()[-1])


def seconds(config: PersonalizeConfig) -> float:
    """Seconds of a step on this machine when nothing else uses it: the run's own base, adapter, loss and loop on made-up latents, at
    least two steps after the first two.

    The median of their processor time is shared by as many cores as the least disturbed of them had at a time, one at least: what
    others take of the machine meanwhile makes steps longer, but hardly costlier.
    """
    base = load_base(
        config.base, config.train.mixed_precision, default_device(), quantize=config.quantize, variant=config.variant,
        config=config.base_config,
    )  # fmt: skip
    live = config.adapter.train_text_encoder
    beside = text_adapters(config, config.adapter.method, base) if live else None
    said = base.encode_prompts(["a person"] * 2) if live else None
    base.release_encoders()
    size = config.data.largest or base.resolution
    shapes, rows = shapes_of(config.base, config.base_config), config.data.train_batch_size
    latents = torch.randn(2, *base.latent_shape(size))
    known = base.prompt_shapes(base.model, shapes.tokens)
    prompts = said or Prompts(
        {n: torch.ones(2, *s, dtype=torch.bool) if n == "mask" else torch.randn(2, *s) for n, s in known.items()}
    )
    encoded = Encoded(latents, torch.zeros_like(latents), prompts, ("one", "two"))
    prior = encoded if config.data.with_prior_preservation else None
    task = _Timed(
        encoded, base, rows, prior=prior, prior_batch_size=max(1, rows // 2), snr_gamma=config.adapter.snr_gamma,
        preserved=prompts if config.data.preservation else None,
    )  # fmt: skip
    if config.gradient_checkpointing:
        base.model.enable_gradient_checkpointing()
    targets = list(config.adapter.target_modules or base.targets)
    setup = adapter_setup(config, config.adapter.method, targets)
    parts = config.train.gradient_accumulation_steps
    loop = replace(
        type(config.train)(), max_train_steps=12, lr_warmup_steps=0, checkpointing_steps=10**6, gradient_accumulation_steps=parts,
        mixed_precision=config.train.mixed_precision,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="smidgen-plan-") as folder:
        task.stop = time.perf_counter() + LONGEST
        with contextlib.suppress(_Enough):
            fit(
                "plan",
                base.model,
                task,
                setup,
                rates(config, config.adapter.method),
                loop,
                Path(folder),
                beside=beside,
                progress=False,
            )
    return parts * _undisturbed(task.at, 2 * parts)


def _undisturbed(at: Sequence[tuple[float, float]], first: int) -> float:
    """Seconds from one of ``at``, (clock, processor time), to the next on an idle machine; the ``first`` do not count if there are more."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(at)]
    steps = steps[first:] or steps[-1:]
    cores = max(1.0, *(used / wall for wall, used in steps))
    return statistics.median(used for _, used in steps) / cores


class _Enough(Exception):
    """Steps were tried long enough."""


class _Timed(PersonalizeTask):
    """Notes when each batch is asked for."""

    stop = 0.0
    at: tuple[tuple[float, float], ...] = ()

    def batch(self, index: int) -> dict[str, Any]:
        self.at = (*self.at, (time.perf_counter(), time.process_time()))
        if len(self.at) > 4 and self.at[-1][0] > self.stop:
            raise _Enough
        return super().batch(index)


# ---- what would fit -------------------------------------------------------------------------------------------------


def fitting(config: PersonalizeConfig, memory: float, card: bool = True) -> PersonalizeConfig | None:
    """The settings nearest to ``config`` that need at most ``memory`` bytes; None where none do.

    In this order: as they are, gradient checkpointing, bf16, smaller batches, a base in 8 bits (fp8), in 4 bits (nf4, on a card),
    half the resolution.
    """
    lasting = float("inf")  # least bytes besides activations: where they do not fit, smaller images do not help
    for other in _nearer(config, card):
        if other.data.resolution != config.data.resolution and lasting > memory:
            return None
        plan = make_plan(other, card, measured=False)
        if plan.peak <= memory:
            return other
        lasting = min(lasting, plan.lasting)
    return None


def _nearer(config: PersonalizeConfig, card: bool) -> Iterator[PersonalizeConfig]:
    found = shapes_of(config.base, config.base_config)
    size = config.data.largest or found.pixels or found.base().resolution
    batches = sorted({max(1, config.data.train_batch_size >> n) for n in range(17)}, reverse=True)
    half = (
        replace(config, train=replace(config.train, mixed_precision="bf16"))
        if config.train.mixed_precision == "no"
        else config
    )
    kinds = [config.quantize] if config.quantize else [None, "fp8", *(["nf4"] if card else [])]
    seen = set()
    for resolution in (size, size // 2):
        for kind in kinds:
            for start in (config, half) if kind is None else (half,):
                for batch in batches:
                    for less in (config.gradient_checkpointing, True):
                        data = replace(config.data, train_batch_size=batch)
                        if resolution != size:
                            data = replace(data, resolution=resolution)
                        other = replace(start, data=data, gradient_checkpointing=less, quantize=kind)
                        if other not in seen:
                            seen.add(other)
                            yield other
