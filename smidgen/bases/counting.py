"""How many numbers a config trains in a model or in a named architecture, without weights.

transformers and diffusers are imported only when a named architecture needs them.
"""

from typing import Any

from peft import PeftConfig
from torch import nn

from smidgen.adapters import counting
from smidgen.bases.architectures import architecture, build_architecture


def count(model_or_architecture: nn.Module | str, method_or_config: str | PeftConfig, **options: Any) -> int:
    """Numbers that an adapter would train.

    Args:
        model_or_architecture: a torch model (left untouched, its weights are not read), or the name of an
            architecture: sd15, sdxl, roberta-base, roberta-large, vit-base, vit-large, llama2-7b, ...
        method_or_config: a config from :func:`smidgen.config`, any peft config, or a method's name. Without
            ``target_modules`` the architecture's defaults are taken.
        **options: as in :func:`smidgen.config` when a method is named.

    Returns:
        Trained numbers, heads in ``modules_to_save`` not included.

    Raises:
        ConfigError: an unknown architecture or method, a rank that only weights can tell (``r="energy:0.99"``), or a
            config that peft refuses.
        TargetError: a target that matches nothing or cannot carry an adapter.
        MissingExtraError: the architecture's library is not installed.

    Example:
        >>> count("sd15", "tlora(2,6)")
        400288
        >>> count(nn.Sequential(nn.Linear(64, 32)), "svfit", r=8, target_modules=["0"])
        8
    """
    if not isinstance(model_or_architecture, str):
        return counting.count(model_or_architecture, method_or_config, **options)
    own = counting.chosen_config(method_or_config, options)
    model = build_architecture(model_or_architecture)
    if getattr(own, "target_modules", "none to set") is None:
        own.target_modules = architecture(model_or_architecture).targets_in(model)  # type: ignore[attr-defined]
    return counting.count(model, own)
