"""What commands need beside the engine: looked for before they start, so that none stops half-way for want of a package."""

from collections.abc import Sequence
from importlib.util import find_spec

from smidgen.cli.table import COMMANDS
from smidgen.errors import MissingExtraError

PACKAGES = {  # what an extra brings, as it is imported
    "diffusion": ("diffusers", "matplotlib"),
    "tasks": ("sklearn", "scipy", "matplotlib"),
    "control": ("cv2", "sklearn"),
    "world": ("dicebear", "resvg_py"),
    "zoo": ("pyarrow", "psutil", "scipy"),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart"),
    "ui": ("gradio", "uvicorn", "diffusers", "sklearn"),
}


def check_extras(command: str, words: Sequence[str]) -> None:
    """Raises MissingExtraError when ``command`` would miss a package; its ``--help`` needs none."""
    if {"-h", "--help"} & set(words):
        return
    lacking = {
        extra: [name for name in PACKAGES[extra] if find_spec(name) is None] for extra in COMMANDS[command].needs
    }
    if any(lacking.values()):
        packages = dict.fromkeys(name for names in lacking.values() for name in names)
        raise MissingExtraError(
            f"`smidgen {command}` needs {' and '.join(packages)}, not installed here: pip install 'smidgen[{','.join(lacking)}]'"
        )
