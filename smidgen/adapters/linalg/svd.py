"""The leading part of a singular value decomposition (SVFit, arXiv 2409.05926: W_r = U_r diag(S_r) V_r^T)."""

import torch
from torch import Tensor

from smidgen.errors import ConfigError


def truncated_svd(weight: Tensor, r: int, *, seed: int = 0, tolerance: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] descending, Vh [r, n] in float32 on the weight's device."""
    _check(weight, r)
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()


def energy_rank(singular_values: Tensor, energy: float, norm: str = "sigma2") -> int:
    """The least rank whose singular values hold a share ``energy`` of the total.

    ``norm`` "sigma2" counts squares (the squared Frobenius norm), "sigma" counts the values themselves (nuclear norm).

    Raises:
        ConfigError: energy outside 0..1 (0 excluded), an unknown norm, or no singular values.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.0]), 0.9), energy_rank(torch.tensor([3.0, 1.0, 0.0]), 0.9, "sigma")
        (1, 2)
    """
    if norm not in ("sigma2", "sigma"):
        raise ConfigError(f"the norm of an energy rank is 'sigma2' or 'sigma', got {norm!r}")
    if not 0.0 < energy <= 1.0 or singular_values.dim() != 1 or not singular_values.numel():
        raise ConfigError(f"an energy rank needs 0 < energy <= 1 and a vector of singular values, got energy {energy}")
    values = singular_values.double().sort(descending=True).values
    share = (values**2 if norm == "sigma2" else values).cumsum(0)
    return min(int((share < energy * share[-1]).sum()) + 1, values.numel())


def _check(weight: Tensor, r: int) -> None:
    if weight.dim() != 2:
        raise ConfigError(f"truncated_svd needs a matrix [m, n], got shape {tuple(weight.shape)}")
    if not 1 <= r <= min(weight.shape):
        raise ConfigError(f"the rank of a truncated_svd is 1..min(m, n) = {min(weight.shape)}, got {r}")
    if not torch.isfinite(weight).all():
        raise ConfigError("truncated_svd needs finite numbers, got a weight with NaN or infinity")
