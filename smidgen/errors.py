"""One family of errors: every refusal of Smidgen is a ``SmidgenError``, and a ``SmidgenError`` is a ``ValueError``.

A message states the rule, the offending value and what would work.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SmidgenError(ValueError):
    """Base of all errors raised by Smidgen at its boundaries."""


class ConfigError(SmidgenError):
    """An option has no meaning or a value outside its range."""


class TargetError(SmidgenError):
    """A target module does not exist or cannot carry the method."""


class BaseLockError(SmidgenError):
    """The adapter was made for another base model; ``report`` says how its weights compare, where they were read."""

    report: object = None


class AdapterFileError(SmidgenError):
    """An adapter file is missing, truncated, hostile or does not fit the model."""


class DataError(SmidgenError):
    """Training data cannot be read or has nothing to learn from."""


class FetchError(SmidgenError):
    """A pinned package is not here and cannot be downloaded, or is not what was pinned."""


class TrainingError(SmidgenError):
    """Training cannot go on: a loss or gradient that is not finite, or a run that was told to stop."""


class CheckpointError(SmidgenError):
    """A training checkpoint cannot be written, is damaged, or belongs to another run."""


class HubError(SmidgenError):
    """The Hugging Face Hub cannot be reached, or refuses an upload."""


class MissingExtraError(SmidgenError):
    """An optional dependency is needed; the message names the extra to install."""


_RANK, _STEPS = ("rank", "r"), ("max_train_steps",)
OTHER_NAMES = {  # what other tools call a setting -> our names for it, of which those that are known in a place are offered
    **dict.fromkeys(("lr", "unet_lr"), ("learning_rate", "invert_rate", "refine_rate")),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_train_epochs"), ("num_train_epochs", *_STEPS)),
    **dict.fromkeys(("iterations", "max_steps"), _STEPS),
    **dict.fromkeys(("enable_bucket", "enable_bucketing", "bucketing", "buckets"), ("aspect_ratio_bucketing",)),
    **dict.fromkeys(("mask_path", "mask_dir", "masks", "conditioning_data_dir"), ("mask_folder",)),
    **dict.fromkeys(("masked_training", "mask", "use_masks"), ("masked_loss",)),
    **dict.fromkeys(("mask_min_value", "unmasked_weight"), ("mask_min_weight",)),
    **dict.fromkeys(("num_repeats", "repeat"), ("repeats",)),
    "steps": ("max_train_steps", "inference_steps", "invert_steps", "refine"),
    **dict.fromkeys(("num_steps", "num_inference_steps"), ("inference_steps", "steps", "max_train_steps")),
    **dict.fromkeys(
        ("batch_size", "bs", "per_device_train_batch_size"), ("train_batch_size", "batch_size", "invert_batch")
    ),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), ("guidance_scale", "guidance")),
    **dict.fromkeys(("rank", "r", "lora_r", "lora_rank", "network_dim", "dim"), _RANK),
    **dict.fromkeys(("lora_alpha", "network_alpha"), ("alpha",)),
    **dict.fromkeys(("targets", "lora_target_modules", "lora_target", "modules"), ("target_modules",)),
    **dict.fromkeys(("weight", "scale", "lora_scale", "lora_weight"), ("strength", "control_scale")),
    **dict.fromkeys(("n", "num", "count", "num_samples"), ("num_images", "num_pictures")),
    **dict.fromkeys(("output", "output_dir", "o"), ("out",)),
    "size": ("resolution",),
    "scheduler": ("lr_scheduler",),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio"), ("lr_warmup_steps",)),
    "wd": ("weight_decay",),
    **dict.fromkeys(("precision", "dtype", "fp16", "bf16"), ("mixed_precision",)),
    **dict.fromkeys(("pretrained_model_name_or_path", "model_name_or_path", "base_model"), ("base", "model")),
    "force": ("overwrite",),
    "resume": ("resume_from_checkpoint",),
    "save_steps": ("checkpointing_steps",),
    **dict.fromkeys(("peft_type", "adapter_type"), ("method",)),
}


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """``" Did you mean 'q_proj'?"`` for the nearest known names, or ``""`` when nothing is near. Never ``name`` itself.
    What other tools call a setting leads to our name for it.

    Example:
        >>> did_you_mean("q_porj", ["q_proj", "v_proj"])
        " Did you mean 'q_proj' or 'v_proj'?"
        >>> did_you_mean("lr", ["r", "learning_rate"])
        " Did you mean 'learning_rate'?"
    """
    known = set(known) - {name}
    ours = [other for other in OTHER_NAMES.get(name.casefold().replace("-", "_"), ()) if other in known]
    if ours:
        return f" Did you mean {' or '.join(repr(other) for other in ours[:most])}?"
    folded = {other.casefold(): other for other in sorted(known, reverse=True)}
    near = [folded[other] for other in get_close_matches(name.casefold(), folded, n=most, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def shown(value: object, most: int = 200) -> str:
    """A value as a message shows it: what it is in code, cut where it goes on and on."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
