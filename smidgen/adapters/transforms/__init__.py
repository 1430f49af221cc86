"""Transforms: the T of ``W' = S (W T + D)``. One file a member; a new member is added to this table and nowhere else."""

from smidgen.adapters.member import Transform
from smidgen.adapters.transforms.diagonal import Diagonal
from smidgen.adapters.transforms.rotation import Rotation
from smidgen.adapters.transforms.tensor_ring import TensorRingTransform

TRANSFORMS: dict[str, type[Transform]] = {m.name: m for m in (TensorRingTransform, Rotation, Diagonal)}
