"""The command that opens the page in a browser: ``ui``."""

from pathlib import Path


def ui(folder: Path = Path("runs"), host: str = "127.0.0.1", port: int = 7860, offline: bool = True) -> None:
    """Serve a page to make adapters with, draw with them and take them along; Ctrl-C ends it, trainings go on.

    Args:
        folder: where runs are kept, a folder each.
        host: who may look: 127.0.0.1 is this machine alone. There is no login; give another address on a network you trust.
        port: of the page.
        offline: nothing is asked of the Hugging Face Hub, by the page or by trainings it starts; --no-offline allows hub names as bases.
    """
    import os

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from smidgen.serving.page import serve

    serve(folder, host, port)
