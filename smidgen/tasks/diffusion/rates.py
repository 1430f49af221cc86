"""What the learning rates of the text-to-image tasks go by."""

from smidgen.adapters.methods import Kind
from smidgen.bases.stable_diffusion import EMBEDDED

PEFT_LORA = "peft's LoRA"


def picture_kind(base: str) -> Kind:
    """What learning rates go by for an image generator."""
    return "picture_embedded" if base == EMBEDDED else "picture"
