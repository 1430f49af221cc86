"""The base models that ship with Smidgen, which draw 64x64 portraits on a CPU: a genuine Stable Diffusion pipeline and two genuine
FLUX.2 [klein] ones.

`world` and `wide` know the portraits (identities, scenes, captions, drawing), `judge` and `wide_judge` score pictures. ``pipeline/``
holds the weights of the first, ``flow/`` what the second has besides, ``wide_flow/`` what that of the wide world has besides both.
"""

from pathlib import Path

from smidgen.bases.embedded.layers import put_together
from smidgen.errors import ConfigError, SmidgenError, did_you_mean

EMBEDDED, EMBEDDED_FLOW, EMBEDDED_WIDE = "embedded", "embedded-flow", "embedded-wide"
PIPELINE, FLOW, WIDE_FLOW = (Path(__file__).parent / name for name in ("pipeline", "flow", "wide_flow"))
FOLDERS = {EMBEDDED: (PIPELINE,), EMBEDDED_FLOW: (PIPELINE, FLOW), EMBEDDED_WIDE: (PIPELINE, FLOW, WIDE_FLOW)}
"""Name of an embedded base -> the folders that make it up, each laid over those before."""
_MADE_BY = {
    EMBEDDED: "all` (about two hours on two cores)",
    EMBEDDED_FLOW: "flow` (about an hour on two cores)",
    EMBEDDED_WIDE: "flow --world wide` (about an hour and a half on two cores)",
}


def embedded_base(name: str = EMBEDDED) -> Path:
    """The folder of an embedded base, fp16 safetensors: ``"embedded"``, a ``StableDiffusionPipeline`` (14 MB), or
    ``"embedded-flow"`` and ``"embedded-wide"``, each a ``Flux2KleinPipeline`` (17 MB, put together in ``~/.cache/smidgen`` when it is
    first asked for).

    Raises ConfigError for another name, SmidgenError where the package lacks the files.

    Example:
        >>> pipe = StableDiffusionPipeline.from_pretrained(embedded_base())
        >>> pipe("a portrait of a person, smiling", num_inference_steps=20, guidance_scale=2).images[0].size
        (64, 64)
    """
    if name not in FOLDERS:
        raise ConfigError(
            f"No embedded base is called {name!r}.{did_you_mean(name, FOLDERS)} There are: {', '.join(FOLDERS)}."
        )
    folders = FOLDERS[name]
    for folder in folders:
        if not (folder / "model_index.json").exists():
            raise SmidgenError(
                f"The embedded base is missing from {folder}: reinstall smidgen, or train it with "
                f"`python -m smidgen.lab.embedded_base --stage {_MADE_BY[name]}."
            )
    return folders[0] if len(folders) == 1 else put_together(name, folders)
