"""Model cards: of an adapter that a generator made, and of a generator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint.files import LORA_NAME, public_name
from smidgen.bases.families import card_lines
from smidgen.difflora.generator.directions import FILE, load_directions
from smidgen.difflora.generator.generator import CODEC, JSON, POSSIBLE, TENSORS, Generator
from smidgen.difflora.generator.reading import load_reader
from smidgen.difflora.weightspace.layout import Layout
from smidgen.tasks.cards import adapter_head, bullets, licence, model_card

FACES = (
    "Faces are biometric data: whoever makes or shares an adapter of a real person needs that person's consent. Do not use it "
    "to deceive anybody about a real person."
)


def adapter_card(layout: Layout, base: str, recipe: Mapping[str, Any], size: int, sheet: bool, lora: bool) -> str:
    """README.md of an adapter folder; ``size`` in bytes, ``lora``: there is a file for diffusers too."""
    base = public_name(base)
    loaded, sampling = card_lines(base)
    kind = layout.config.get("method") or layout.config.get("residual") or layout.config.get("transform")
    call = f"pipe.load_lora_weights(FOLDER, weight_name={LORA_NAME!r})"
    use = f"""The prompt says "a person", as for anybody.

```python
import smidgen
{loaded}
smidgen.load(pipe, "path/of/this/folder")
pipe(prompt="a portrait of a person, smiling"{sampling}).images[0]
```

{"" if lora else "After `import smidgen`, "}`peft.PeftModel.from_pretrained(denoiser, folder)` reads it too. `smidgen verify FOLDER --base BASE` proves that it
is on."""
    told = bullets(f"{name}: {_said(value)}" for name, value in recipe.items() if name != "latent")
    return model_card(
        adapter_head(base, "text-to-image", "difflora", str(kind)),
        f"A person as a {kind} adapter of {size:,} bytes",
        f"{layout.size:,} numbers for `{base}`, made by a DiffLoRA generator of Smidgen.",
        "![rows: what it was made from, the base, the adapters](contact_sheet.png)" if sheet else "",
        ("Use", use + (f"\n\nWithout smidgen: `{call}`." if lora else "")),
        (
            "Recipe",
            f"{told}\n\n`recipe.json` holds it all with the latent, from which `smidgen edit` and `smidgen blend` go on.",
        ),
        licence(base, more=FACES),
    )


def write_card(generator: Generator, folder: Path) -> None:
    """Writes README.md into the generator's folder."""
    replace_file(folder / "README.md", generator_card(generator, folder))


def generator_card(generator: Generator, folder: Path) -> str:
    """README.md of the generator saved in ``folder``."""
    base = public_name(generator.base)
    head = {
        "base_model": base,
        "library_name": "smidgen",
        "pipeline_tag": "text-to-image",
        "tags": ["smidgen", "difflora"],
    }
    return model_card(
        head,
        f"A DiffLoRA generator for `{base}`",
        f"A photo of a person in, an adapter of that person for `{base}` out, without training (arXiv 2408.06740).",
        "    smidgen predict PHOTO --generator THIS_FOLDER --out ann\n"
        '    smidgen generate ann --prompt "a portrait of a person"',
        ("What it is", bullets(f"{name}: {value}" for name, value in facts_of(generator, folder).items())),
        ("Made by", "    smidgen generator train --config THIS_FOLDER/config.yaml --out ANOTHER_FOLDER"),
        (
            "Limits",
            "It knows people as its training people differ. What they had in common (one style, one crop) it takes for "
            f"granted; what its encoders do not see it cannot predict. {FACES}",
        ),
    )


def facts_of(generator: Generator, folder: Path) -> dict[str, Any]:
    """Sizes, base, encoders and bytes of the generator in ``folder``, for people."""
    files = [
        folder / JSON,
        folder / TENSORS,
        *folder.glob(POSSIBLE),
        *sorted((folder / CODEC).glob("codec.*")),
        *folder.glob("directions.safetensors"),
        *folder.glob("reading.safetensors"),
    ]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files if path.is_file()}
    layout, model = generator.layout, generator.model
    numbers = sum(parameter.numel() for parameter in generator.network.parameters())
    codec = sum(value.numel() for value in generator.codec._numbers().values())
    kind = layout.config.get("method") or layout.config.get("residual") or layout.config.get("transform")
    rank = f", rank {layout.config['r']}" if "r" in layout.config else ""
    return {
        "base": public_name(generator.base),
        "adapters": f"{kind}{rank}: {layout.size:,} numbers on {len({entry.key for entry in layout.entries})} targets",
        "encoders": f"{generator.sees.face} for the face, {generator.sees.image} for the picture; both frozen",
        "network": f"{numbers:,} numbers: width {model.width}, {model.depth} blocks, {model.tokens} tokens",
        "codec": f"{generator.codec.name}, {generator.network.latents} latents, {codec:,} numbers",
        "predicts": f"{model.prediction}, {model.inference_steps} sampling step(s), guidance {model.guidance_scale:g}",
        "bytes": f"{sum(sizes.values()):,} ({', '.join(f'{name} {size:,}' for name, size in sizes.items())})",
        "digest": generator.digest[:16],
    }


def told(generator: Generator, folder: Path) -> str:
    """The same as lines for a terminal, with the sliders there are and what is known of photos."""
    lines = [str(folder), *(f"  {name}: {value}" for name, value in facts_of(generator, folder).items())]
    if (folder / FILE).is_file():
        sliders = load_directions(folder, generator).directions
        lines.append(f"  sliders: {', '.join(direction.name for direction in sliders)}")
    if (reader := load_reader(folder, generator)) is not None:
        floors = ", ".join(f"{name} {word.floor:.2f}" for name, word in reader.words.items())
        lines.append(
            f"  reads photos: {reader.quantile:.1%} of held-out ones pass each limit"
            + (f"; floors: {floors}" if floors else "")
        )
    return "\n".join(lines)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
