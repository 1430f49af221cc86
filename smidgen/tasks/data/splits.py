"""Which examples are held out, decided by what they say: a cut that neither order nor row numbers can move, with
its share of every class."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data.tables import counted

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
NAMES = ("train", "validation", "test")


def digest(*parts: str | bytes) -> str:
    """Which content this is, as 32 hexadecimal digits."""
    raw = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    return hashlib.blake2b(b"\x1f".join(raw), digest_size=16).hexdigest()


def complete(
    found: Mapping[str, Sequence[T]],
    key: Callable[[T], str],
    share: float,
    most: int | None = None,
    classes: Callable[[T], tuple[int, ...]] = lambda example: (),
) -> dict[str, list[T]]:
    """Train, validation and test examples, those splits that ``found`` lacks cut from its train split.

    The examples whose ``key`` digests are lowest are held out, ``share`` of all for each missing split and about as much
    of each of the ``classes``; equal keys stay together. ``most`` then keeps that many train examples, chosen the same
    way. Raises DataError when too few are left.
    """
    if not 0 < share < 0.5:
        raise ConfigError(f"held_out_share must lie between 0 and 0.5, not {share}.")
    splits = {name: list(found.get(name, ())) for name in NAMES}
    for name in ("test", "validation"):
        if not splits[name]:
            wanted = math.ceil(share * len(found["train"]))
            train = splits["train"]
            keys = [key(example) for example in train]
            held = _lowest(keys, [classes(example) for example in train], wanted, partial(_rank, salt=name))
            splits[name] = [example for example, k in zip(train, keys, strict=True) if k in held]
            splits["train"] = [example for example, k in zip(train, keys, strict=True) if k not in held]
    if not splits["train"]:
        total, different = len(found["train"]), len({key(example) for example in found["train"]})
        alike = f", of which {different} differ," if different < total else ""
        raise DataError(
            f"Nothing is left to train on: {total} example(s){alike} are too few to hold some out. Add more."
        )
    if most is not None and most < len(splits["train"]):
        if most < 1:
            raise ConfigError(f"max_train_examples must be at least 1, not {most}.")
        train = splits["train"]
        places = range(len(train))
        kept = _lowest(places, [classes(one) for one in train], most, lambda at: (_rank(key(train[at]), "some"), at))
        splits["train"] = [train[at] for at in sorted(kept)]
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


def contradictions(examples: Sequence[Any], key: Callable[[Any], str], noun: str, what: str) -> list[str]:
    """A warning that counts the examples, by their ``where``, whose key has several labels."""
    labels: dict[str, set[Any]] = {}
    for example in examples:
        labels.setdefault(key(example), set()).add(example.label)
    double = [example.where for example in examples if len(labels[key(example)]) > 1]
    return [counted(noun, double, what)] if double else []


def _lowest(keys: Sequence[K], classes: Sequence[tuple[int, ...]], wanted: int, rank: Callable[[K], Any]) -> set[K]:
    """The lowest-ranked keys that hold at least ``wanted`` examples together, each class about its share of them.

    The rarest class chooses first, as in iterative stratification (Sechidis et al. 2011); a class of four or more gets
    one at least, as long as there is room.
    """
    groups: dict[K, list[int]] = {}
    for at, key in enumerate(keys):
        groups.setdefault(key, []).append(at)
    of_class: dict[int, list[K]] = {}
    order = sorted(groups, key=rank)
    for key in order:
        for label in dict.fromkeys(label for at in groups[key] for label in classes[at]):
            of_class.setdefault(label, []).append(key)
    sizes = Counter(label for some in classes for label in some)
    held_of: Counter[int] = Counter()
    chosen: set[K] = set()
    held = 0

    def take(key: K) -> None:
        nonlocal held
        chosen.add(key)
        held += len(groups[key])
        held_of.update(label for at in groups[key] for label in classes[at])

    for label in sorted(sizes, key=lambda label: (sizes[label], label)):
        seats = max(math.floor(wanted * sizes[label] / len(keys) + 0.5), int(sizes[label] >= 4))
        for key in of_class[label]:
            if held >= wanted or held_of[label] >= seats:
                break
            if key not in chosen:
                take(key)
    for key in order:
        if held >= wanted:
            break
        if key not in chosen:
            take(key)
    return chosen


def _rank(key: str, salt: str) -> str:
    return digest(salt, key)
