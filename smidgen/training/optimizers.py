"""The optimizers a run may take, each from the library that keeps it. Their whole state is in ``state``, which checkpoints hold."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch

from smidgen.errors import MissingExtraError

Name = Literal["adamw", "adamw8bit", "adafactor"]


def make_optimizer(name: Name, groups: Iterable[Mapping[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """An optimizer of ``groups`` (mappings with ``params``, ``lr`` and ``weight_decay``) on ``device``.

    - adamw: torch's (Loshchilov and Hutter 2019).
    - adamw8bit: bitsandbytes', whose moments take 8 bits (Dettmers et al. 2022) in tensors of 4,096 numbers or more.
    - adafactor: transformers' (Shazeer and Stern 2018), which keeps second moments by rows and columns alone; at the groups' own
      learning rates, as the relative ones of the paper stand still at parameters that start at zero.

    Raises MissingExtraError where its library is not installed.

    Example:
        >>> type(make_optimizer("adamw", [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1}], torch.device("cpu")))
        <class 'torch.optim.adamw.AdamW'>
    """
    own = [dict(group) for group in groups]
    if name == "adamw":
        fused = device.type == "cpu" or None  # of many small tensors; None: torch's own choice
        return torch.optim.AdamW(own, fused=fused)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(own, lr=1e-3, scale_parameter=False, relative_step=False)  # type: ignore[no-any-return]
    if not find_spec("bitsandbytes"):
        raise MissingExtraError("--optimizer adamw8bit needs bitsandbytes: pip install 'smidgen[quantised]'")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(own)  # type: ignore[no-any-return]
