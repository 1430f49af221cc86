"""What commands need beside the engine: looked for before they start, so that none stops half-way for want of a package."""

from collections.abc import Sequence
from importlib.util import find_spec

from smidgen.errors import MissingExtraError

PACKAGES = {  # what an extra brings, as it is imported
    "diffusion": ("diffusers", "matplotlib"),
    "tasks": ("sklearn", "scipy", "matplotlib"),
    "control": ("cv2", "sklearn"),
    "world": ("dicebear", "resvg_py"),
    "zoo": ("pyarrow", "psutil", "scipy"),
}
NEEDS = {  # a command that is not here needs none; what only some options of a command need is named where they are used
    "train text-classification": ("tasks",),
    "train image-classification": ("tasks",),
    "train instruction": ("tasks",),
    "train control": ("diffusion", "control"),
    "personalize": ("diffusion",),
    "subject": ("world",),
    "pairs": ("world",),
    "generate": ("diffusion",),
    "verify": ("diffusion",),
    "compare": ("tasks",),
    "predict": ("diffusion",),
    "edit": ("diffusion",),
    "blend": ("diffusion",),
    "invert": ("diffusion",),
    "sample": ("diffusion",),
    "zoo build": ("diffusion", "zoo"),
    "zoo status": ("zoo",),
    "zoo import": ("diffusion", "zoo"),
    "zoo evaluate": ("diffusion", "zoo"),
    "zoo plan": ("diffusion",),
    "generator train": ("diffusion", "zoo"),
    "generator directions": ("diffusion", "zoo"),
}


def check_extras(command: str, words: Sequence[str]) -> None:
    """Raises MissingExtraError when ``command`` would miss a package; its ``--help`` needs none."""
    if {"-h", "--help"} & set(words):
        return
    lacking = {extra: [name for name in PACKAGES[extra] if find_spec(name) is None] for extra in NEEDS.get(command, ())}
    if any(lacking.values()):
        packages = dict.fromkeys(name for names in lacking.values() for name in names)
        raise MissingExtraError(
            f"`smidgen {command}` needs {' and '.join(packages)}, not installed here: pip install 'smidgen[{','.join(lacking)}]'"
        )
