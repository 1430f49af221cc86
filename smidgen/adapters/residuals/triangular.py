"""Triangular residual (LoLDU): D = P L_r diag(delta) U_r, factors of the base weight's LDU decomposition, frozen.

LoLDU (arXiv 2410.13618): W = P L D U with partial pivoting; the first r diagonal entries train. delta = z - z0 from
zero is the same function for every identity-preserving start of the paper. Trained: delta [r]. Count: min(r, rows,
cols). Stored besides: the first r pivot rows, 2 bytes each (4 above 65,535 rows); with them the factors survive a
re-cast base, without them a bf16 copy gives unrelated ones (docs/speed.md).
A step without a pivot (a weight of lower rank) is one of the adapter's ties, which are kept too: what rounding would make
of it is nowhere rebuilt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.linalg.cache import cached
from smidgen.adapters.linalg.ldu import ldu, raw_atoms, undetermined, unit_atoms
from smidgen.adapters.member import Tensors
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis
from smidgen.errors import ConfigError


class Triangular(DiagonalInBasis):
    """D = P L_r diag(delta) U_r.

    Args:
        rows, cols: shape of the matrix.
        r: directions: a whole number, or "full".
        alpha, scaling: see :func:`smidgen.adapters.member.scale_of`.
        atoms: "unit" gives every direction norm one, so one learning rate suits all; "raw" is the paper's.
    """

    name = "triangular"

    def __init__(
        self,
        rows: int,
        cols: int,
        r: int | str = 64,
        alpha: float | None = None,
        scaling: str = "plain",
        atoms: str = "unit",
    ) -> None:
        super().__init__(rows, cols, r, alpha, scaling)
        if atoms not in ("unit", "raw"):
            raise ConfigError(f"atoms of a triangular residual are 'unit' or 'raw', got {atoms!r}.")
        self.atoms = atoms

    def pins(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"pivots": ((self.r,), torch.uint16 if self.rows <= 65_536 else torch.int32)}

    def decompose(self, weight: Tensor, pins: Tensors | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given = None if pins is None else pins["pivots"].to(torch.int64)
        ties = None if pins is None or "ties" not in pins else pins["ties"].to(torch.int64)
        dtype = self.pins()["pivots"][1]

        def compute() -> dict[str, Tensor]:
            f = ldu(weight, self.r, given, dead=None if ties is None else _steps(ties, self.r))
            fresh = _ties(*undetermined(f)) if given is None else torch.zeros(0, dtype=torch.int32)
            up, down = unit_atoms(f) if self.atoms == "unit" else raw_atoms(f)
            if ties is not None:
                gone = ties[ties >= 0]
                up, down = up.index_fill(1, gone, 0.0), down.index_fill(0, gone, 0.0)
            return {"up": up.float(), "down": down.float(), "pivots": f.pivots.to(torch.int32), "ties": fresh}

        key = ("ldu with ties", self.r, self.atoms, *(None if t is None else tuple(t.tolist()) for t in (given, ties)))
        found = dict(cached(key, weight, compute))
        pivots, fresh = found.pop("pivots").to(dtype), found.pop("ties")
        if not len(fresh):
            return found, {"pivots": pivots}
        along, _ = self.decompose(weight, {"pivots": pivots, "ties": fresh})
        return along, {"pivots": pivots, "ties": fresh}


def _ties(weak: Tensor, gone: Tensor) -> Tensor:
    """Steps without a pivot as int32: i where the atom is zero, -1 - i where its row still gives it a direction."""
    rest = weak[~torch.isin(weak, gone)]
    return torch.cat([gone, -1 - rest]).to(torch.int32).cpu()


def _steps(ties: Tensor, r: int) -> Tensor:
    steps = torch.where(ties >= 0, ties, -1 - ties)
    if bool((steps >= r).any()) or steps.unique().numel() != steps.numel():
        raise ConfigError(f"Ties of {r} steps are steps below it, got {ties.tolist()[:12]}.")
    return steps
