"""What makes steps quick on a processor while everything that is kept stays in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def mixed() -> torch.autocast:
    """bf16 where the processor multiplies in it; emulated, a step takes twenty times as long as in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


@contextmanager
def quick_attention() -> Iterator[None]:
    """``mixed``, and attention by matrix products: over few tokens a processor goes back through those a third faster than through its
    flash attention. Elsewhere than on a processor nothing changes."""
    if torch.accelerator.is_available():
        yield
        return
    with mixed(), sdpa_kernel(SDPBackend.MATH):
        yield
