"""A folder of peft's (IA)^3: a factor for each feature of a layer's outputs, or of its input (a feed-forward layer, as peft calls it).

peft multiplies the whole output, so that on a layer with a bias the bias is scaled too, which S W is not: such a layer is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftConfig
from torch import Tensor

from smidgen.adapters.checkpoint.formats.format import Place, Scales, Source
from smidgen.adapters.checkpoint.formats.peft import PeftFolder, matching
from smidgen.errors import AdapterFileError

ENDINGS = {"ia3_l": "factors"}


class PeftIa3(PeftFolder):
    name = "peft-ia3"
    summary = "a folder of peft's (IA)^3, for peft and transformers: adapters of ia3 on layers without a bias, and of diagonal"
    holds = "scales"
    peft_type = "IA3"
    endings = ENDINGS

    def refusal(self, place: Place, source: Source) -> str | None:
        if place.kind == "experts":
            return "peft's (IA)^3 knows no fused experts; --to merged holds it"
        return None

    def config(self, places: Mapping[Place, Scales], options: Mapping[str, Any]) -> PeftConfig:
        of_input = any(own.of_input for own in places.values())
        transposed = all(place.kind == "conv1d" for place in places)
        targets = options["target_modules"]
        return IA3Config(feedforward_modules=targets if of_input else [], fan_in_fan_out=transposed, **options)

    def layers(self, places: Mapping[Place, Scales]) -> dict[Place, dict[str, Tensor]]:
        return {place: {"ia3_l": own.factors.reshape(_shape(place, own.of_input))} for place, own in places.items()}

    def check_layer(
        self, place: Place, own: Mapping[str, Tensor], value: Scales, config: Mapping[str, Any], where: Path
    ) -> None:
        of_input = place.layer in matching(config.get("feedforward_modules") or (), {place.layer})
        wanted = value.factors.reshape(_shape(place, value.of_input))
        if of_input != value.of_input or not torch.equal(own["factors"], wanted):
            raise AdapterFileError(f"{where.name}: peft would scale {place} otherwise than the adapter.")


def _shape(place: Place, of_input: bool) -> tuple[int, ...]:
    if place.kind == "conv2d":
        return (1, -1, 1, 1)
    return (1, -1) if of_input else (-1, 1)
