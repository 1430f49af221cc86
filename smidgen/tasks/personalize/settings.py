"""The settings of a personalisation: frozen configs, and presets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smidgen.adapters.methods import Rates, learning_rates, parse_method
from smidgen.bases.families import learning_kind
from smidgen.errors import ConfigError
from smidgen.tasks.finetune.settings import check_output
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check, check_value

PEFT_LORA = "peft's LoRA"  # the baseline


@dataclass(frozen=True)
class Data:
    """The subject's pictures and what is said about them."""

    folder: Path | None = None
    instance_prompt: str | None = None  # caption of pictures that have none
    class_word: str = "person"  # what the subject is one of
    placeholder_token: str | None = None  # a rare word put before the class word, such as sks
    class_prompt: str | None = None  # None: the captions themselves, which name no subject
    with_prior_preservation: bool = False  # also train on the base's own pictures of the class
    prior_loss_weight: float = 1.0  # of the class pictures' loss
    num_class_images: int = 32  # drawn once by the base, half a batch in each batch
    caption_dropout: float = 0.0  # share of the subject's captions that train the empty prompt
    preservation: Literal["class", "blank"] | None = (
        None  # prompts whose answers stay the base's; no class pictures needed
    )
    preservation_loss_weight: float = 1.0  # of that
    resolution: int | str | None = None  # None: the base's own; several as in 512,768
    train_batch_size: int = 4  # pictures of the subject in a batch
    aspect_ratio_bucketing: bool = False  # train each picture near its own shape; off: at its centre square
    masked_loss: bool = False  # learn what masks leave: masks/portrait.png or portrait_mask.png for portrait.png
    mask_folder: Path | None = None  # where the masks are, if not beside the pictures
    alpha_mask: bool = False  # learn what is opaque
    mask_min_weight: float = 0.0  # what the rest counts beside it, 0 to 1; a tenth teaches it nearly as fast
    num_train_epochs: int | None = None  # passes over the pictures, in place of max_train_steps
    subject: tuple[str, ...] = ()  # folders and their words, such as ann=sks "rex=ohwx dog"; in place of a folder
    subjects: Path | None = None  # YAML list of folders, each with its own words and more; in place of a folder

    @property
    def source(self) -> str:
        """Where the pictures are, "" where nothing says it."""
        return str(self.folder or self.subjects or "") or ", ".join(self.subject)

    @property
    def largest(self) -> int | None:
        """The largest of several sizes."""
        from smidgen.tasks.data.buckets import numbers

        return None if self.resolution is None else max(numbers(self.resolution))

    def __post_init__(self) -> None:
        if self.alpha_mask and (self.masked_loss or self.mask_folder):
            raise ConfigError(
                "alpha_mask takes the pictures' own opacity; leave out masked_loss and mask_folder, or alpha_mask."
            )
        given = {"a folder": self.folder, "subject": " ".join(self.subject) or None, "subjects": self.subjects}
        told = [f"{name} ({value})" for name, value in given.items() if value is not None]
        if len(told) > 1:
            raise ConfigError(f"Give {' or '.join(told)}, not both.")
        own = self.placeholder_token or self.class_prompt or self.subject or self.subjects
        if self.preservation == "class" and not own:
            raise ConfigError(
                "preservation class holds the class to what the base draws, so the subject needs a word of its own: give it "
                "one, as with --placeholder-token sks, or say the class with --class-prompt; --preservation blank needs none."
            )
        if self.preservation == "blank" and self.caption_dropout:
            raise ConfigError(
                f"caption_dropout {self.caption_dropout} teaches the empty prompt the subject, and preservation blank keeps it "
                "as it was; take one of them."
            )


@dataclass(frozen=True)
class Adapter:
    """What is trained. None leaves a choice to the method's own defaults."""

    method: str = "tlora"  # one of `smidgen methods`, tlora(2,6) and the like, or a pair such as rotation+low_rank
    output: str | None = None  # output transform behind it, or in place of its own: scale, magnitude, output_rotation
    rank: int | str | None = None  # r of the residual: a number, full, or energy:0.99 (svfit)
    alpha: float | None = None  # strength of the residual at 1.0, where the method has one
    transform_rank: int | None = None  # ring rank of tlora's transform
    residual_rank: int | None = None  # ring rank of tlora's residual
    target_modules: tuple[str, ...] | None = None  # endings of the denoiser's module names; None: the base's own
    learning_rate: float | None = None  # None: the method's own for the base
    transform_learning_rate: float | None = None  # None: in the method's proportion to the residual's
    train_text_encoder: bool = False  # adapters on the text encoders of Stable Diffusion and SDXL too
    text_encoder_learning_rate: float | None = None  # None: half the denoiser's
    weight_decay: float = 0.0  # pulls towards the base
    snr_gamma: float | None = None  # min-SNR weighting; None: off
    weighting_scheme: Literal["logit_normal", "uniform", "none", "mode", "sigma_sqrt", "cosmap"] | None = (
        None  # of noise levels, for bases of flow matching; none is uniform; None: logit_normal
    )
    shift: float | None = None  # of noise levels towards noise, for bases of flow matching; None: the base's own

    def __post_init__(self) -> None:
        parse_method(self.method)  # raises where there is none
        check_output(self.output)
        if self.text_encoder_learning_rate is not None and not self.train_text_encoder:
            raise ConfigError("text_encoder_learning_rate is for --train-text-encoder, which is off.")


@dataclass(frozen=True)
class Show:
    """What is drawn and scored at the end."""

    validation_prompt: tuple[str, ...] = ()  # none: scenes of the judge, or the captions
    num_prompts: int = 8  # scenes to draw and score
    num_seeds: int = 2  # pictures of each scene
    seeds: tuple[int, ...] = ()  # of each scene's pictures, in place of num_seeds of the run's own
    negative_prompt: str = ""  # what guidance leads away from
    preview_size: str | None = None  # width and height of what is drawn, such as 96x64; None: square, at the resolution
    inference_steps: int | None = None  # None: as the base's kind needs
    guidance_scale: float | None = None  # None: as the base's kind needs
    compare_lora: bool | None = None  # train peft's LoRA the same way; None: when a judge exists for the base

    def __post_init__(self) -> None:
        for seed in self.seeds:
            check_value("seed", seed)


@dataclass(frozen=True)
class PersonalizeConfig:
    """One personalisation."""

    data: Data = field(default_factory=Data)
    adapter: Adapter = field(default_factory=Adapter)
    train: LoopConfig = field(default_factory=LoopConfig)
    show: Show = field(default_factory=Show)
    base: str = "embedded"  # embedded, embedded-flow, embedded-wide, the folder of a diffusers pipeline, its hub name, or one .safetensors file
    base_config: str | None = None  # of a base in one file: folder or hub name of a pipeline of the same model
    quantize: str | None = None  # nf4, int8, int8-torchao or fp8: the base in fewer bits while it is trained on
    variant: str | None = None  # of the base's files, such as fp16
    helper_adapter: str | None = (
        None  # LoRA file that undoes a base's distillation while yours is trained; none: without one
    )
    from_adapter: Path | None = (
        None  # go on from the adapter in this folder: new pictures, more steps, other learning rates
    )
    out: Path = Path("runs/personalize")  # where everything goes
    resume_from_checkpoint: str | None = None  # latest, or checkpoint-<step>
    overwrite: bool = False  # start again where an earlier run left checkpoints
    gradient_checkpointing: bool = False  # less memory, slower steps

    def __post_init__(self) -> None:
        check(self)


PRESETS = {
    "default": PersonalizeConfig(),
    "debug": PersonalizeConfig(
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2),
        show=Show(num_prompts=2, num_seeds=1, inference_steps=2),
    ),
    "thorough": PersonalizeConfig(
        data=Data(with_prior_preservation=True, train_batch_size=8), train=LoopConfig(max_train_steps=600)
    ),
}


def rates(config: PersonalizeConfig, method: str) -> Rates:
    """The learning rates of this run: the flags where given, else the defaults of ``method``."""
    chosen, kind = config.adapter, learning_kind(config.base)
    if method == PEFT_LORA:
        return learning_rates("peft:lora", kind)
    usual = learning_rates(method, kind, output=chosen.output)
    return usual.chosen(chosen.learning_rate, chosen.transform_learning_rate)


def text_rates(config: PersonalizeConfig, method: str) -> Rates:
    """The learning rates of text encoders."""
    own = rates(config, method)
    return own.chosen(config.adapter.text_encoder_learning_rate or own.residual / 2, None)
