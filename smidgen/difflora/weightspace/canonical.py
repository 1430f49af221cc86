"""One representative for all pairs of factors with the same product.

B A = (B R)(R^-1 A) for any invertible R, so raw factors of two adapters cannot be compared, unless both grew from one
start. The canonical pair follows from the product alone:

    QR(B) = Qb Rb,  QR(A^T) = Qa Ra,  SVD(s Rb Ra^T) = U S V^T
    B' = Qb U sqrt(S) G,  A' = G sqrt(S) V^T Qa^T

with the scale s (alpha / r) folded into S and G a diagonal of signs that turns each component towards a reference
adapter. A sign rule of its own, such as "largest entry positive", flips between neighbours and destroys the signal.
Worked out in fp64; the dense product is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.difflora.weightspace.layout import Layout


def canonical_factors(
    b: Tensor, a: Tensor, scale: float = 1.0, reference: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(B', A') with B' A' = scale B A, the same for every (B R, R^-1 A).

    Args:
        b, a: factors [..., rows, r] and [..., r, cols].
        scale: the factor in front of the product.
        reference: canonical factors of the adapter that signs are turned to; None leaves them as they come.

    Example:
        >>> b, a = torch.randn(6, 2), torch.randn(2, 4)
        >>> mix = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
        >>> reference = canonical_factors(b, a)
        >>> mixed = canonical_factors(b @ mix, mix.inverse() @ a, reference=reference)
        >>> torch.allclose(mixed[0], reference[0], atol=1e-5)
        True
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(scale * rb @ ra.mT, full_matrices=False)
    width, kept = b.shape[-1], s.shape[-1]
    new_b = qb @ u * s.sqrt()[..., None, :]
    new_a = s.sqrt()[..., :, None] * (vh @ qa.mT)
    if reference is not None:
        ref_b, ref_a = (part.double() for part in reference)
        towards = (new_b * ref_b[..., :, :kept]).sum(-2) + (new_a * ref_a[..., :kept, :]).sum(-1)
        signs = torch.where(towards < 0, -1.0, 1.0).to(new_b)
        new_b, new_a = new_b * signs[..., None, :], new_a * signs[..., :, None]
    if kept < width:  # rank above a side of the matrix: the rest of the product is nothing
        new_b = torch.nn.functional.pad(new_b, (0, width - kept))
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, width - kept))
    return new_b.to(b.dtype), new_a.to(a.dtype)


def canonical_rows(rows: Tensor, layout: Layout, reference: Tensor | None = None) -> Tensor:
    """Rows [..., size] with every pair of factors in canonical form; other tensors are left alone.

    Deltas are unchanged: a layout's own scale is divided out of B' again. ``reference`` is a canonical row [size].
    Families without two trained factors (SVFit, LoLDU, TLoRA's cores) have no such ambiguity and come back as they are.
    """
    layout.check_width(rows)
    pairs = list(layout.factor_pairs())
    if not pairs:
        return rows
    rows = rows.clone()
    for a, b in pairs:
        lead = rows.shape[:-1]
        old_b, old_a = (rows[..., e.columns].reshape(*lead, *e.shape) for e in (b, a))
        turned = None
        if reference is not None:
            turned = (reference[b.columns].reshape(b.shape), reference[a.columns].reshape(a.shape))
        new_b, new_a = canonical_factors(old_b, old_a, scale=a.scale, reference=turned)
        rows[..., a.columns] = new_a.flatten(-2)
        rows[..., b.columns] = (new_b / a.scale).flatten(-2)
    return rows


def refactor(b: Tensor, a: Tensor, scale: float, r: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of rank r of scale B A, and the relative error of the product (Frobenius); exact for r at or
    above the rank."""
    new_b, new_a = canonical_factors(b, a, scale)
    have = new_b.shape[-1]
    if r >= have:
        pad = r - have
        return torch.nn.functional.pad(new_b, (0, pad)), torch.nn.functional.pad(new_a, (0, 0, 0, pad)), 0.0
    power = new_b.double().square().sum(-2)  # singular values: columns of B' have norm sqrt(S)
    total = float(power.square().sum())
    lost = float(power[..., r:].square().sum())
    return new_b[..., :r].clone(), new_a[..., :r, :].clone(), (lost / total) ** 0.5 if total > 0 else 0.0
