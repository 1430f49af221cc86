"""The settings of a generator: frozen sections, presets, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smidgen.bases.embedded import EMBEDDED, EMBEDDED_WIDE
from smidgen.difflora.zoo.settings import Subjects, ZooConfig
from smidgen.errors import ConfigError
from smidgen.tasks.personalize.settings import Adapter
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check


def _at_least_1(section: object, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(section, name)}.")


@dataclass(frozen=True)
class Encoders:
    """What sees the photo; both stay frozen. Names as in ``smidgen.difflora.generator.encoders``."""

    face: str = "embedded-face"  # or wide-face, or arcface:FILE.onnx
    image: str = "embedded-scene"  # or wide-scene, clip, dinov2, or a transformers folder
    moved_photos: float = (
        0.0  # share of training photos that are seen 0.8 to 1.25 times as large, a tenth off the middle
    )


@dataclass(frozen=True)
class Model:
    """Sizes of the mixing of features and of the diffusion transformer."""

    gate: Literal["softmax", "sigmoid"] = "softmax"  # shares of face and image, or each by itself
    width: int = 128  # of the condition and of the transformer
    depth: int = 4  # blocks
    heads: int = 4
    latents: int = 64  # numbers that an adapter is made from; a fitted codec has its own
    per_layer: bool = False  # each layer of the base has as many of its own, and a basis (one token for each suits)
    int8: bool = False  # keep network and basis in 8 bits
    tokens: int = 8  # pieces that the latents are cut into
    prediction: Literal["x0", "v", "flow"] = "x0"  # what the transformer answers
    inference_steps: int = 1  # of the sampler, unless asked otherwise
    guidance_scale: float = 1.0  # away from nobody in particular, unless asked otherwise

    def __post_init__(self) -> None:
        _at_least_1(self, "width", "depth", "heads", "latents", "tokens", "inference_steps")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads.")


@dataclass(frozen=True)
class TwoStage:
    """The paper's stage: a diffusion over the latents of a zoo's adapters."""

    zoo: Path | None = None  # the zoo; None leaves this stage out
    codec: Literal["pca", "conv_autoencoder", "token_autoencoder"] = "pca"
    batch_size: int = 64  # adapters in a step
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    condition_dropout: float = 0.1  # share of photos that are hidden, for guidance
    condition_noise: float = 0.0  # added to photos' features, in their deviations: what they do not say stays open
    hidden_photos: int = 0  # of each person, made anew, that hide something: half of the photos then are such
    hidden_noise: float = 0.8  # as condition_noise, of those
    train: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            max_train_steps=3000, lr_warmup_steps=100, checkpointing_steps=500, ema_decay=0.999
        )
    )


LEARNED, SHIPPED_BASIS = "learned", "shipped"


@dataclass(frozen=True)
class SharedBasis:
    """The two stages inside one basis, adapter = mean + z B: a zoo whose people have a z each and nothing else, a diffusion over
    them (``two_stage``), and rounds of both that start from its predictions."""

    basis: str = (
        LEARNED  # with everybody's latents from nothing; shipped, or a generator's folder, for the basis of that
    )
    people: Subjects = field(
        default_factory=lambda: Subjects(people=1000, held_out=300, pictures=6, same_scenes=False, people_seed=1)
    )
    batch_size: int = 32  # people in a batch
    pictures: int = 1  # of each in a batch, while the basis is learnt
    noise_power: float = 3.0  # strong noise is shown more often, where a picture is laid out; 1: as to the base
    learning_rate: float = 1e-3  # of mean and basis
    latent_learning_rate: float = 5e-3  # of everybody's latents beside them
    first_spread: float = 0.3  # deviation of the latents that they start from
    train: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_train_steps=6000, lr_warmup_steps=50, checkpointing_steps=100)
    )
    zoo_pictures: int = 1  # of each person in a step of a zoo
    zoo_learning_rate: float = 0.35  # of latents, in their deviations
    zoo: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_train_steps=48, lr_warmup_steps=0, checkpointing_steps=1)
    )  # in a given basis; one that is learnt brings its zoo
    rounds: int = 3  # zoos, each with its diffusion; all but the first start at what was predicted
    round_learning_rate: float = 0.13
    round_pull: float = 0.006  # weight of the mean squared distance from what was predicted
    round: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_train_steps=24, lr_warmup_steps=0, checkpointing_steps=1)
    )
    snr_gamma: float | None = None  # min-SNR weighting of the base's loss; None: off
    gradient_checkpointing: bool = False  # less memory, slower steps

    def __post_init__(self) -> None:
        _at_least_1(self, "batch_size", "pictures", "zoo_pictures", "rounds", "noise_power")


@dataclass(frozen=True)
class EndToEnd:
    """The stage that generalises: the denoising loss through decoder, adapter and frozen base."""

    people: Subjects = field(
        default_factory=lambda: Subjects(people=3000, held_out=300, pictures=6, same_scenes=False, people_seed=1)
    )
    batch_size: int = 32  # people in a step
    pictures: int = 1  # of each that its adapter has to draw
    references: int = 3  # photos of each at most that the generator sees
    noise_power: float = (
        1.0  # how much oftener strong noise is shown at first; over three fifths of the steps it falls to 1
    )
    generator: str | None = None  # to go on from, shipped or a folder; None: the two stages, or nothing
    learning_rate: float = 5e-4  # of the transformer
    decoder_learning_rate: float | None = (
        None  # of what turns latents into adapters; None: 0.08 of personalize's own rate
    )
    snr_gamma: float | None = None  # min-SNR weighting of the base's loss; None: off
    short_captions: int | None = (
        None  # tokens of captions that two thirds of the steps see: quicker, on a base that masks none
    )
    base_loss_weight: float = 0.1  # of the diffusion over its own latents, with which nobody in particular is drawn
    gradient_checkpointing: bool = False  # less memory, slower steps
    train: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            max_train_steps=7000, lr_warmup_steps=100, checkpointing_steps=500, ema_decay=0.999
        )
    )

    def __post_init__(self) -> None:
        _at_least_1(self, "batch_size", "pictures", "references", "noise_power")


@dataclass(frozen=True)
class OwnLatents:
    """The last stage: a second network beside a generator that was trained end to end, a diffusion (``two_stage``) over that one's
    answers to people's photos. The first knows one answer to a photo, the second all that fit: photos that hide something teach it which."""

    generator: str | None = None  # None: that of the end-to-end stage; shipped, or a folder
    people: Subjects = field(
        default_factory=lambda: Subjects(people=1000, held_out=300, pictures=6, same_scenes=False, people_seed=1)
    )
    model: Model = field(
        default_factory=lambda: Model(width=104, depth=3, int8=True)
    )  # of this network; latents are the generator's


@dataclass(frozen=True)
class GeneratorConfig:
    """One generator. Without a zoo and without ``shared_basis`` the two stages are left out, without ``end_to_end`` the next one; with
    both the end-to-end stage goes on from the two stages' weights, and ``adapter`` is that of the zoo. ``own_latents`` comes last."""

    adapter: Adapter = field(default_factory=lambda: Adapter(method="lora", rank=4))
    shared: Literal["none", "learned", "random"] = "none"  # LoRA's A: predicted, one for all, or one that stays random
    encoders: Encoders = field(default_factory=Encoders)
    model: Model = field(default_factory=Model)
    two_stage: TwoStage = field(default_factory=TwoStage)
    shared_basis: SharedBasis | None = None
    end_to_end: EndToEnd | None = field(default_factory=EndToEnd)
    own_latents: OwnLatents | None = None
    base: str = EMBEDDED  # embedded, the folder of a Stable Diffusion or SDXL pipeline, or its hub name
    out: Path = Path("generator")  # where everything goes
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)
        own = self.own_latents
        if self.two_stage.zoo is None and self.shared_basis is None and self.end_to_end is None and own is None:
            raise ConfigError(
                "Nothing to train: give a zoo for the paper's two stages, a shared_basis for those inside one basis, or keep the "
                "end-to-end stage."
            )
        if own is not None and (own.generator is None) == (self.end_to_end is None):
            raise ConfigError(
                f"own_latents.generator is {own.generator!r}: it names a generator that was trained before, and is left out after an "
                "end-to-end stage."
            )
        staged = self.two_stage.zoo is not None or self.shared_basis is not None
        if staged and self.end_to_end is not None and self.end_to_end.generator is not None:
            raise ConfigError("end_to_end.generator is what training goes on from; leave out the two stages, or it.")
        if self.two_stage.zoo is not None and self.shared_basis is not None:
            raise ConfigError(
                f"two_stage.zoo={str(self.two_stage.zoo)!r} and shared_basis: a zoo in a shared basis is trained here. Leave one out."
            )


_POSSIBLE = TwoStage(
    learning_rate=1.5e-3,
    weight_decay=1e-2,
    condition_noise=0.1,
    hidden_photos=24,
    hidden_noise=0.03,
    train=LoopConfig(max_train_steps=12000, lr_warmup_steps=30, checkpointing_steps=500, ema_decay=0.998),
)

_WIDE = GeneratorConfig(
    encoders=Encoders("wide-face", "wide-scene", moved_photos=0.5),
    model=Model(latents=16, per_layer=True, int8=True, tokens=36, depth=2),
    end_to_end=EndToEnd(
        people=Subjects(people=5000, held_out=200, pictures=4, same_scenes=False, people_seed=1),
        decoder_learning_rate=2e-3,
        short_captions=32,
        train=LoopConfig(max_train_steps=7000, lr_warmup_steps=50, checkpointing_steps=100, ema_decay=0.998),
        noise_power=3.0,
    ),
    base=EMBEDDED_WIDE,
)

PRESETS = {
    "default": GeneratorConfig(two_stage=_POSSIBLE, own_latents=OwnLatents()),
    "seeds": GeneratorConfig(two_stage=_POSSIBLE, end_to_end=None, own_latents=OwnLatents("shipped")),
    "paper": GeneratorConfig(
        adapter=ZooConfig().adapter,
        model=Model(inference_steps=50, guidance_scale=1.0),
        two_stage=TwoStage(zoo=Path("zoo"), codec="conv_autoencoder"),
        end_to_end=None,
    ),
    "two-stage": GeneratorConfig(
        model=Model(inference_steps=50, guidance_scale=1.0),
        two_stage=TwoStage(
            learning_rate=1.5e-3,
            weight_decay=1e-2,
            condition_noise=0.1,
            train=LoopConfig(max_train_steps=1000, lr_warmup_steps=30, checkpointing_steps=250, ema_decay=0.99),
        ),
        shared_basis=SharedBasis(),
        end_to_end=None,
    ),
    "wide": _WIDE,
    "debug": GeneratorConfig(
        model=Model(width=16, depth=1, heads=2, latents=8, tokens=2),
        end_to_end=EndToEnd(
            people=Subjects(people=6, held_out=0, pictures=2, same_scenes=False, people_seed=1),
            batch_size=2,
            train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2),
        ),
        two_stage=TwoStage(batch_size=4, train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2)),
    ),
}
