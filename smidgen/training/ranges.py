"""The values that settings may have, by what their names end in: one table for commands, config files and Python."""

import dataclasses
import math
from typing import Any

from smidgen.errors import ConfigError

_SHARES = ("ema_decay", "dropout", "held_out_share")  # from 0, and below 1
_POSITIVE = ("rate", "snr_gamma", "max_grad_norm", "alpha", "shift")  # above 0
_RANGES: tuple[tuple[str, float, float], ...] = (  # end of a name, least, most; the first that fits
    ("seed", 0, 2**63 - 1),
    ("batch_size", 1, 65_536),
    ("batch", 1, 65_536),
    ("group_size", 1, 65_536),
    ("strength", -10, 10),
    ("control_scale", -10, 10),
    ("guidance", -1000, 1000),
    ("guidance_scale", -1000, 1000),
    ("inference_steps", 1, 10_000),
    ("max_train_steps", 1, 10**9),
    ("num_images", 1, 100_000),
    ("num_pictures", 1, 100_000),
    ("num_prompts", 1, 100_000),
    ("num_seeds", 1, 100_000),
    ("num_class_images", 1, 100_000),
    ("num_columns", 1, 1000),
    ("max_train_examples", 1, 2**63 - 1),
    ("resolution", 8, 16_384),
    ("weight_decay", 0, 1e9),
    ("loss_weight", 0, 1e9),
    ("min_weight", 0, 1),
    ("repeats", 1, 100_000),
    ("num_train_epochs", 1, 10**9),
    ("max_new_tokens", 1, 10**6),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("workers", 1, 4096),
    ("hint_width", 1, 65_536),
    ("refine", 0, 10**6),
)


def check(config: Any) -> None:
    """Raises ConfigError for a number in ``config``, a dataclass of settings with its sections, that cannot be meant."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check(value) if dataclasses.is_dataclass(value) else check_value(field.name, value)


def check_value(name: str, value: Any) -> None:
    """Raises ConfigError when ``value`` is a number that the setting ``name`` cannot have.

    Example:
        >>> check_value("max_grad_norm", float("nan"))
        Traceback (most recent call last):
        smidgen.errors.ConfigError: max_grad_norm must be a finite number, not nan.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    exact = {"steps": (1, 10_000)}.get(name)  # of a sampler; others say of what they are
    least, most = exact or next(((low, high) for end, low, high in _RANGES if _ends(name, end)), (-math.inf, 2**63 - 1))
    if not math.isfinite(value):
        rule = "a finite number"
    elif any(_ends(name, end) for end in _POSITIVE):
        rule = "" if 0 < value <= 1e9 else "above 0 and at most 1e9"
    elif any(_ends(name, end) for end in _SHARES):
        rule = "" if 0 <= value < 1 else "at least 0 and below 1"
    elif not least <= value <= most:
        rule = f"from {least:,} to {most:,}" if least > -math.inf else "below 2**63"
    else:
        rule = ""
    if rule:
        raise ConfigError(f"{name} must be {rule}, not {value}.")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f"_{end}")
