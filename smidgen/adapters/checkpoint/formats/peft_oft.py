"""A folder of peft's OFT: the rotation of the input, block by block.

    ours: y = x R^T, R = (I - Q)^-1 (I + Q), q the lower triangle of Q     peft: y = x (I - Q)(I + Q)^-1, its vector the upper triangle

The two are one map, as Q^T = -Q; the vector is negated and in another order. ``use_cayley_neumann=False``: peft's default cuts the
inverse off after five terms. peft has one block size for all layers, or one number of blocks: smaller blocks go into larger ones, whose
other numbers are zero. Of a convolution peft turns patches that overlap, which is the same for kernels of 1 x 1 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, lcm
from pathlib import Path
from typing import Any

import torch
from peft import OFTConfig, PeftConfig
from torch import Tensor

from smidgen.adapters.checkpoint.files import read_config, read_tensors
from smidgen.adapters.checkpoint.formats.format import EXACT, Place, Rotation, Source, sides
from smidgen.adapters.checkpoint.formats.peft import WRAP, PeftFolder
from smidgen.errors import AdapterFileError

ENDINGS = {"oft_R.weight": "q"}


class PeftOft(PeftFolder):
    name = "peft-oft"
    summary = "a folder of peft's OFT, for peft and transformers: adapters of the method oft"
    holds = "rotation"
    peft_type = "OFT"
    endings = ENDINGS

    def refusal(self, place: Place, source: Source) -> str | None:
        if place.kind == "conv2d" and place.groups == 1 and set(place.shape[2:]) == {1}:
            return None
        if place.kind != "linear":
            return "peft's OFT turns a linear layer's input, or that of a 1 x 1 convolution; --to full-diff or merged hold it"
        return None

    def config(self, places: Mapping[Place, Rotation], options: Mapping[str, Any]) -> PeftConfig:
        return OFTConfig(**self._blocks(places), use_cayley_neumann=False, **options)

    @staticmethod
    def _blocks(places: Mapping[Place, Rotation]) -> dict[str, Any]:
        """peft's block size, or its number of blocks, that has room for all layers' blocks."""
        block = lcm(*(own.block for own in places.values()))
        if all(place.shape[1] % block == 0 for place in places):
            return {"r": 0, "oft_block_size": block}
        return {"r": gcd(*(len(own.q) for own in places.values())), "oft_block_size": 0}

    def layers(self, places: Mapping[Place, Rotation]) -> dict[Place, dict[str, Tensor]]:
        own = self._blocks(places)
        sizes = {place: own["oft_block_size"] or place.shape[1] // own["r"] for place in places}
        return {place: {"oft_R.weight": _upper(_together(skew(own), sizes[place]))} for place, own in places.items()}

    def check_layer(
        self, place: Place, own: Mapping[str, Tensor], value: Rotation, config: Mapping[str, Any], where: Path
    ) -> None:
        blocks = int(config.get("r") or 0) or place.shape[1] // int(config.get("oft_block_size") or 1)
        block = place.shape[1] // max(blocks, 1)
        wanted = (blocks, block * (block - 1) // 2)
        if tuple(own["q"].shape) != wanted or config.get("use_cayley_neumann", True) or config.get("coft"):
            raise AdapterFileError(
                f"{where.name}: peft would not make the rotation of {place} of {tuple(own['q'].shape)} numbers; it takes {wanted}."
            )
        q, eye = _from_upper(own["q"].double(), block), torch.eye(block, dtype=torch.float64)
        probe = torch.randn(4, blocks, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs = torch.einsum("nrk,rkc->nrc", probe, torch.linalg.solve(eye + q, eye - q, left=False))
        ours = torch.einsum("nrj,rij->nri", probe.reshape(4, -1, value.block), rotation(value)).reshape(probe.shape)
        change = (ours - probe).norm()
        if not (theirs - ours).norm() <= EXACT * change.clamp(min=1e-30):
            raise AdapterFileError(f"{where.name}: the rotation of {place} is another than the adapter's.")

    @staticmethod
    def read(folder: Path) -> dict[str, Rotation]:
        """The rotations in a folder by its layers' names.

        Raises:
            AdapterFileError: another kind of adapter, peft's approximate map, damage.
        """
        config = read_config(folder)
        if config.get("peft_type") != "OFT" or config.get("use_cayley_neumann", True) or config.get("coft"):
            raise AdapterFileError(
                f"{folder} holds no OFT by Cayley's exact map (use_cayley_neumann=False, coft=False)."
            )
        tensors = {key.removeprefix(WRAP): value for key, value in read_tensors(folder).items()}
        found = {}
        for name, own in sides(tensors, ENDINGS, folder).items():
            block = round((1 + (1 + 8 * own["q"].shape[1]) ** 0.5) / 2)
            q = _from_upper(own["q"].float(), block)
            rows, cols = torch.tril_indices(block, block, offset=-1)
            found[name] = Rotation(q[:, rows, cols].contiguous(), block)
        return found


def skew(own: Rotation) -> Tensor:
    """Q [blocks, b, b] of a rotation as Smidgen keeps it."""
    rows, cols = torch.tril_indices(own.block, own.block, offset=-1)
    lower = own.q.new_zeros(len(own.q), own.block, own.block)
    lower[:, rows, cols] = own.q
    return lower - lower.mT


def rotation(own: Rotation) -> Tensor:
    """R [blocks, b, b], in double precision."""
    q, eye = skew(own).double(), torch.eye(own.block, dtype=torch.float64)
    return torch.linalg.solve(eye - q, eye + q)


def _together(q: Tensor, block: int) -> Tensor:
    """Blocks [n, b, b] as fewer of size ``block``, along their diagonals."""
    each = block // q.shape[1]
    return torch.stack([torch.block_diag(*part) for part in q.split(each)])


def _upper(q: Tensor) -> Tensor:
    rows, cols = torch.triu_indices(q.shape[1], q.shape[1], 1)
    return q[:, rows, cols].contiguous()


def _from_upper(vector: Tensor, block: int) -> Tensor:
    rows, cols = torch.triu_indices(block, block, 1)
    upper = vector.new_zeros(len(vector), block, block)
    upper[:, rows, cols] = vector
    return upper - upper.mT
