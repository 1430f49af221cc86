"""Residuals: the D of ``W' = S (W T + D)``. One file a member; a new member is added to this table and nowhere else."""

from smidgen.adapters.member import Residual
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.residuals.seeded import Seeded
from smidgen.adapters.residuals.spectral import Spectral
from smidgen.adapters.residuals.tensor_ring import TensorRingResidual
from smidgen.adapters.residuals.triangular import Triangular

RESIDUALS: dict[str, type[Residual]] = {m.name: m for m in (LowRank, TensorRingResidual, Spectral, Triangular, Seeded)}
