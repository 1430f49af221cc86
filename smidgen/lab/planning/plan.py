"""What a generator for a large base costs before anybody pays for it: operations, bytes, hours and disk.

    plan = make_plan("sdxl", Assumptions(people=3000))

Operations and bytes of a row are counted on the meta device (``dry_run.py``); everything else is multiplication, and
every factor is an assumption that the plan prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.settings import Model
from smidgen.difflora.weightspace.pca import NUMBERS
from smidgen.difflora.zoo.group import PROBES
from smidgen.difflora.zoo.settings import ZooConfig, adapter_config
from smidgen.errors import ConfigError
from smidgen.lab.planning.bases import Shape, base_shape, picture_encoder, text_encoders, vae_encoder
from smidgen.lab.planning.dry_run import group_step, numbers
from smidgen.tasks.personalize.settings import Adapter
from smidgen.training.cost import ADAM, CARDS, Card, Cost, cost

FACE_FLOPS = 12_660_000_000 + 20_000_000_000  # ArcFace IResNet-50 (6.33 G multiplications, published) and SCRFD-10G
FACE_WIDTH, IMAGE_WIDTH = 512, 768


VAE = "VAE in fp32, once for the zoo, once end to end"


@dataclass(frozen=True)
class Assumptions:
    """What is not counted but chosen."""

    people: int = 3000
    pictures: int = 6  # of each person, each with a caption of its own
    rank: int = 4  # of LoRA on to_q, to_k, to_v, to_out.0
    zoo_steps: int = 800  # optimizer steps of an adapter, one picture each (weights2weights' recipe)
    two_stage_steps: int = 3000  # of 64 adapters
    end_to_end_steps: int = 8000
    end_to_end_people: int = 16  # in a step
    end_to_end_pictures: int = 2  # of each of them
    latents: int = 64  # numbers that an adapter is made from
    utilisation: float = 0.35  # share of a card's peak that training reaches
    cpu_flops: float = 5e11  # operations a second of the server's processor, where encoders and PCA run

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if not 0 < self.utilisation <= 1 or not self.cpu_flops > 0:
            raise ConfigError(f"utilisation {self.utilisation} must lie in (0, 1], cpu_flops above 0.")


FIXED = {
    "two-stage batch": 64,
    "share of a card's memory that can be used": 0.92,
    "bytes of a card for CUDA, work space and fragments": 2e9,
}


@dataclass(frozen=True)
class Counted:
    """What the dry run found for one base and rank."""

    adapter: int  # numbers
    plain: Cost  # a row without gradient checkpointing
    checkpointed: Cost
    vae_flops: int
    text_flops: int
    image_flops: int
    frozen_bytes: int  # of VAE (fp32) and text encoders (bf16)
    unet_bytes: int  # bf16
    network: int  # numbers of the diffusion transformer and the mixing
    network_flops: int  # of one adapter's training


@dataclass(frozen=True)
class Plan:
    """The plan for one base. ``flops`` and ``cpu_flops`` by stage, ``disk`` in bytes by what it is for, ``fits`` by card."""

    base: str
    assumptions: Assumptions
    counted: Counted
    flops: dict[str, float]
    cpu_flops: dict[str, float]
    disk: dict[str, float]
    memory: dict[str, float]
    fits: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def hours(self) -> dict[str, dict[str, float]]:
        """GPU hours of each stage on each card."""
        share = self.assumptions.utilisation * 3600
        return {
            card.name: {s: f / (share * (card.single if s == VAE else card.peak)) for s, f in self.flops.items()}
            for card in CARDS
        }


@lru_cache(maxsize=8)
def count(base: str, rank: int, latents: int) -> Counted:
    """The dry run for one base."""
    shape = base_shape(base)
    unet, config = shape.build(), adapter_config(ZooConfig(adapter=Adapter(method="lora", rank=rank)))
    dtype = torch.bfloat16
    plain, less = (group_step(shape.family, unet, config, shape.latent, checked, dtype) for checked in (False, True))
    texts, vae = text_encoders(shape), vae_encoder(shape)
    size, flops = _network(latents)
    return Counted(
        adapter=numbers(unet, config), plain=plain, checkpointed=less, vae_flops=vae.flops, text_flops=texts.flops,
        image_flops=picture_encoder().flops, frozen_bytes=4 * vae.numbers + 2 * texts.numbers,
        unet_bytes=2 * shape.parameters, network=size, network_flops=flops,
    )  # fmt: skip


def _network(latents: int) -> tuple[int, int]:
    """Numbers of the generator's network, and operations of training it on one adapter's latents."""
    with torch.device("meta"):
        network = Network(FACE_WIDTH, IMAGE_WIDTH, latents, Model())
        noisy, times = torch.empty(1, latents), torch.zeros(1, dtype=torch.long)
        face, image = torch.empty(1, 1, FACE_WIDTH), torch.empty(1, 1, IMAGE_WIDTH)
    found = cost(lambda: network(noisy, times, network.mixing(face, image)).sum())
    return sum(parameter.numel() for parameter in network.parameters()), found.forward + found.training


def make_plan(base: str, assumed: Assumptions) -> Plan:
    """The plan of one base; ConfigError for one whose shapes are not known."""
    shape = base_shape(base)
    found = count(base, assumed.rank, assumed.latents)
    plan = Plan(base, assumed, found, _flops(found, assumed), _cpu(found, assumed), _disk(shape, found, assumed), {})
    blocks = 6.0 * 4 * min(NUMBERS, 512 * found.adapter)
    features = 4.0 * assumed.people * assumed.pictures * (FACE_WIDTH + IMAGE_WIDTH)
    memory = {"PCA: blocks": blocks, "PCA: Gram matrix": 8.0 * assumed.people**2, "features of all pictures": features}
    return replace(plan, memory=memory, fits={card.name: _fits(found, assumed, card) for card in CARDS})


def _flops(found: Counted, assumed: Assumptions) -> dict[str, float]:
    """Operations on GPUs."""
    examples = assumed.people * assumed.pictures
    step = found.checkpointed.forward + found.checkpointed.training
    people, pictures = assumed.end_to_end_people, assumed.end_to_end_pictures
    decoding = 6 * assumed.latents * found.adapter + found.network_flops  # rows = mean + z B, and back
    return {
        VAE: 2 * examples * found.vae_flops,
        "text encoders, likewise": 2 * examples * found.text_flops,
        "zoo: training": assumed.people * assumed.zoo_steps * step,
        "zoo: losses of the gate": assumed.people * 2 * PROBES * found.plain.forward,
        "two stages: transformer": assumed.two_stage_steps * FIXED["two-stage batch"] * found.network_flops,
        "end to end": assumed.end_to_end_steps * people * (pictures * step + decoding),
    }


def _cpu(found: Counted, assumed: Assumptions) -> dict[str, float]:
    """Operations on processors: the frozen encoders, and PCA in fp64."""
    n, size = assumed.people, found.adapter
    return {
        "face and image encoders, once for the zoo, once end to end": 2
        * n
        * assumed.pictures
        * (found.image_flops + FACE_FLOPS),
        "PCA of the zoo": float(n) * n * size + 4.0 * n * size * assumed.latents,
    }


def _disk(shape: Shape, found: Counted, assumed: Assumptions) -> dict[str, float]:
    n, pictures = assumed.people, assumed.people * assumed.pictures
    trained = found.network + (1 + assumed.latents) * found.adapter
    features = 4 * (FACE_WIDTH + IMAGE_WIDTH)
    return {
        "zoo: rows in fp32, as built": 4.0 * n * found.adapter,
        "zoo: the same rows in bf16": 2.0 * n * found.adapter,
        "zoo: read by PCA in all its passes": 4.0 * n * found.adapter * passes(assumed, found.adapter),
        "end to end: encoded pictures": float(pictures) * (shape.picture_bytes + features),
        "end to end: encoded captions": float(pictures) * shape.caption_bytes,
        "end to end: two checkpoints": 2.0 * 16 * trained,  # with two moments and the moving average
        "the generator": 2.0 * trained,
    }


def passes(assumed: Assumptions, adapter: int) -> int:
    """How often PCA reads the zoo."""
    block = min(512, max(1, NUMBERS // adapter))
    return -(-assumed.people // block) + 2


def _fits(found: Counted, assumed: Assumptions, card: Card) -> dict[str, float]:
    """Adapters in a group of the zoo, and rows at once end to end, with gradient checkpointing."""
    room = card.memory * FIXED["share of a card's memory that can be used"]
    room -= FIXED["bytes of a card for CUDA, work space and fragments"] + found.unet_bytes
    adapter, row = ADAM * found.adapter, found.checkpointed.bytes
    trained = (ADAM + 4) * (found.network + (1 + assumed.latents) * found.adapter)
    end_to_end = (room - trained) / (row + 3 * 4 * found.adapter)  # a row of its own, its gradient, its pieces
    return {
        "zoo: adapters in a group": max(0, int((room - found.frozen_bytes) / (adapter + row))),
        "end to end: rows at once": max(0, int(end_to_end)),
    }
