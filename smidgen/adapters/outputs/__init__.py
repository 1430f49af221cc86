"""Output transforms: the S of ``W' = S (W T + D)``. One file a member; a new member is added to this table and nowhere else."""

from smidgen.adapters.member import Output
from smidgen.adapters.outputs.magnitude import Magnitude
from smidgen.adapters.outputs.rotation import OutputRotation
from smidgen.adapters.outputs.scale import Scale

OUTPUTS: dict[str, type[Output]] = {m.name: m for m in (Scale, Magnitude, OutputRotation)}
