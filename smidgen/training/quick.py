"""What makes steps quick on a processor while everything that is kept stays in fp32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster there than fp32; emulated, a step takes twenty times as long."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())  # type: ignore[attr-defined]
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed() -> torch.autocast:
    """bf16 where the processor multiplies in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu")))


def attention_by_products() -> AbstractContextManager[None]:
    """Attention by matrix products: over few tokens a processor goes back through those a third faster than through its flash attention.
    Elsewhere than on a processor nothing changes. Where layers are run again in backward (gradient checkpointing) it must last until then."""
    return nullcontext() if torch.accelerator.is_available() else sdpa_kernel(SDPBackend.MATH)


@contextmanager
def quick_attention() -> Iterator[None]:
    """``mixed`` and :func:`attention_by_products`, for trainings without gradient checkpointing."""
    if torch.accelerator.is_available():
        yield
        return
    with mixed(), attention_by_products():
        yield
