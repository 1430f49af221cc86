"""Which examples are held out, decided by what they say: a cut that neither order nor row numbers can move."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data.tables import counted

T = TypeVar("T")
NAMES = ("train", "validation", "test")


def digest(*parts: str | bytes) -> str:
    """Which content this is, as 32 hexadecimal digits."""
    raw = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    return hashlib.blake2b(b"\x1f".join(raw), digest_size=16).hexdigest()


def complete(
    found: Mapping[str, Sequence[T]], key: Callable[[T], str], share: float, most: int | None = None
) -> dict[str, list[T]]:
    """Train, validation and test examples, those splits that ``found`` lacks cut from its train split.

    The examples whose ``key`` digests are lowest are held out, ``share`` of all for each missing split; equal keys stay
    together. ``most`` then keeps that many train examples, chosen the same way. Raises DataError when too few are left.
    """
    if not 0 < share < 0.5:
        raise ConfigError(f"held_out_share must lie between 0 and 0.5, not {share}.")
    splits = {name: list(found.get(name, ())) for name in NAMES}
    for name in ("test", "validation"):
        if not splits[name]:
            wanted = math.ceil(share * len(found["train"]))
            held = set(_lowest(splits["train"], key, wanted, name))
            splits[name] = [example for example in splits["train"] if key(example) in held]
            splits["train"] = [example for example in splits["train"] if key(example) not in held]
    if not splits["train"]:
        total = len(found["train"])
        raise DataError(f"Nothing is left to train on: {total} example(s) are too few to hold some out. Add more.")
    if most is not None and most < len(splits["train"]):
        if most < 1:
            raise ConfigError(f"max_train_examples must be at least 1, not {most}.")
        ranked = sorted(range(len(splits["train"])), key=lambda at: (_rank(key(splits["train"][at]), "some"), at))
        splits["train"] = [splits["train"][at] for at in sorted(ranked[:most])]
    return splits


def leaks(splits: Mapping[str, Sequence[T]], key: Callable[[T], str], name: Callable[[T], str]) -> list[str]:
    """Warnings that count the held-out examples that are also trained on."""
    trained = {key(example) for example in splits["train"]}
    warnings = []
    for split in ("validation", "test"):
        double = [name(example) for example in splits[split] if key(example) in trained]
        if double:
            warnings.append(counted(f"{split} example", double, "also in the train split; its scores flatter"))
    return warnings


def _lowest(examples: Sequence[T], key: Callable[[T], str], wanted: int, salt: str) -> list[str]:
    """The lowest-ranked keys that hold at least ``wanted`` examples together."""
    sizes = Counter(key(example) for example in examples)
    chosen, held = [], 0
    for found in sorted(sizes, key=lambda k: _rank(k, salt)):
        if held >= wanted:
            break
        chosen.append(found)
        held += sizes[found]
    return chosen


def _rank(key: str, salt: str) -> str:
    return digest(salt, key)
