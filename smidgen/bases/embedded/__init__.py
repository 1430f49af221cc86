"""The base model that ships with Smidgen: a genuine Stable Diffusion pipeline drawing 64x64 portraits on a CPU.

`world` knows the portraits (identities, scenes, captions, drawing), `judge` scores pictures, ``pipeline/`` holds the
weights.
"""

from pathlib import Path

from smidgen.errors import SmidgenError

PIPELINE = Path(__file__).parent / "pipeline"


def embedded_base() -> Path:
    """The folder of the embedded ``StableDiffusionPipeline`` (about 14 MB, fp16 safetensors).

    Example:
        >>> pipe = StableDiffusionPipeline.from_pretrained(embedded_base())
        >>> pipe("a portrait of a person, smiling", num_inference_steps=20, guidance_scale=3).images[0].size
        (64, 64)
    """
    if not (PIPELINE / "model_index.json").exists():
        raise SmidgenError(
            f"The embedded base is missing from {PIPELINE}: reinstall smidgen, or train it with "
            "`python -m smidgen.lab.embedded_base --stage all` (about two hours on two cores)."
        )
    return PIPELINE
