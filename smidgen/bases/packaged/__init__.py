"""Pre-trained models and labelled data from PyPI, npm and Debian packages, as the ordinary folders others read.

One file an entry; a new one is a file with an ``ENTRY`` and a line here. Nothing is downloaded before it is asked for.
"""

from collections.abc import Mapping
from pathlib import Path

from smidgen.bases.packaged import (
    chatterbot,
    emoji,
    fashion_mnist,
    foods,
    minilm,
    mnist,
    mpnet,
    quiz,
    smollm2,
    spam,
    tweets,
    vit_s14,
    wordnet,
)
from smidgen.bases.packaged.entry import Packaged
from smidgen.bases.packaged.folders import finished_folder
from smidgen.errors import ConfigError, did_you_mean

MODELS: Mapping[str, Packaged] = {module.ENTRY.name: module.ENTRY for module in (minilm, mpnet, vit_s14, smollm2)}
DATASETS: Mapping[str, Packaged] = {
    module.ENTRY.name: module.ENTRY
    for module in (tweets, foods, spam, emoji, mnist, fashion_mnist, wordnet, quiz, chatterbot)
}


def model_folder(name: str) -> Path:
    """Folder of a packaged model that ``AutoModel.from_pretrained`` and its tokenizer or image processor read.

    Raises:
        ConfigError: no such name, with the nearest ones.
        FetchError: its package is not here and cannot be downloaded.
        MissingExtraError: what reads the package is not installed.

    Example:
        >>> AutoModel.from_pretrained(model_folder("minilm")).config.hidden_size
        384
    """
    return finished_folder(_entry(name, MODELS, "model"))


def dataset_folder(name: str) -> Path:
    """Folder of a packaged data set with its splits train, validation and test.

    Text: ``<split>.parquet`` with columns text and label. Pictures: ``<split>/<label>/*.png``. Instructions:
    ``<split>.jsonl`` with ``messages``. Splits never share an item, and are the same on every machine.

    Raises:
        ConfigError: no such name, with the nearest ones.
        FetchError: its package is not here and cannot be downloaded.
        MissingExtraError: what reads the package is not installed.

    Example:
        >>> sorted(path.name for path in dataset_folder("tweets").glob("*.parquet"))
        ['test.parquet', 'train.parquet', 'validation.parquet']
    """
    return finished_folder(_entry(name, DATASETS, "data set"))


def describe() -> list[dict[str, str]]:
    """Name, kind, summary, licence, attribution and sources of every packaged model and data set.

    Example:
        >>> describe()[0]["name"]
        'minilm'
    """
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "summary": entry.summary,
            "licence": entry.licence,
            "attribution": entry.attribution,
            "sources": "; ".join(map(str, entry.sources)),
        }
        for entry in (*MODELS.values(), *DATASETS.values())
    ]


def _entry(name: str, known: Mapping[str, Packaged], what: str) -> Packaged:
    if name not in known:
        raise ConfigError(f"Unknown packaged {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]
