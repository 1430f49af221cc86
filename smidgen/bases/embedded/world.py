"""The small world the embedded base lives in: who a person is, what a scene is, how both become a picture.

A picture is an *identity* (hair, hair colour, skin, facial hair) in a *scene* (eyes, mouth, clothes, glasses,
background). Captions name the scene only, so a subject can only come from an adapter. Pictures are drawn without a
network by DiceBear from the style "Avataaars" by Pablo Stanley (https://avataaars.com, free for personal and
commercial use), cropped so that a face fills 64x64 pixels. One identity in twelve is held out: `split_of` decides by a
hash, so no list is needed.

Only `render` and what calls it need the extra ``pip install 'smidgen[world]'``; the rest is plain Python.

Example:
    >>> rng = np.random.default_rng(0)
    >>> scene = sample_scene(rng)
    >>> caption(scene).startswith("a portrait of a person")
    True
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import colors
from smidgen.bases.embedded.words import (
    ATTRIBUTES,
    BACKGROUND,
    BROWS,
    CLOTHES,
    CLOTHES_COLOR,
    EYES,
    FACIAL_HAIR,
    GLASSES,
    HAIR,
    HAIR_COLOR,
    IDENTITY_ATTRIBUTES,
    MOUTH,
    SCENE_ATTRIBUTES,  # noqa: F401, for callers
    SKIN,
)
from smidgen.errors import DataError, MissingExtraError, did_you_mean

Split = Literal["train", "test"]
SIZE = 64
CLASS_PHRASE = "a person"
LICENCE = "drawn in the style Avataaars by Pablo Stanley, free for personal and commercial use"
PLACEHOLDERS = ("sks", "ohwx", "zwx", "qbt", "vxk")
"""Rare words the base has seen and learnt to ignore: a name for a subject."""


class Record:
    """A record whose every field must be one of its ``words``; those of ``free`` may also be ``"#rrggbb"``."""

    words: ClassVar[Mapping[str, Mapping[str, Any]]] = ATTRIBUTES
    free: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if name in self.free and isinstance(value, str) and value.startswith("#"):
                colors.rgb(value)
            elif value not in self.words[name]:
                known = ", ".join(map(repr, self.words[name]))
                also = ", or any colour as '#3f6fd8'" if name in self.free else ""
                hint = did_you_mean(str(value), self.words[name])
                raise DataError(f"{name}={value!r} is not drawn in this world.{hint} Known: {known}{also}.")

    def as_dict(self) -> dict[str, str]:
        """Attribute name -> word, or a free colour."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Identity(Record):
    """Who a person is; never captioned."""

    hair: str
    hair_color: str
    skin: str
    facial_hair: str


@dataclass(frozen=True)
class Scene(Record):
    """What a caption may name. Sunglasses hide the eyes, so there the eyes are "hidden" and stay out of the
    caption."""

    eyes: str
    mouth: str
    clothes: str
    clothes_color: str
    glasses: str
    background: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.eyes == "hidden") != (self.glasses == "sunglasses"):
            raise DataError(
                f"eyes={self.eyes!r} with glasses={self.glasses!r}: eyes are hidden by sunglasses, only there."
            )


def split_of(identity: Identity) -> Split:
    """ "test" for one identity in twelve, decided by a hash of its words; the same on every machine."""
    digest = hashlib.sha256("|".join(identity.as_dict().values()).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 12 == 0 else "train"


def identities(split: Split | None = None) -> Iterator[Identity]:
    """All 12,096 identities in a fixed order, or those of one split."""
    for words in product(*IDENTITY_ATTRIBUTES.values()):
        identity = Identity(*words)
        if split is None or split_of(identity) == split:
            yield identity


def _choose(rng: np.random.Generator, words: dict, p: list[float] | None = None) -> str:
    return list(words)[rng.choice(len(words), p=p)]


def sample_identity(rng: np.random.Generator, split: Split = "train") -> Identity:
    """One identity of the split, attributes uniform but for facial hair (40 % have none)."""
    if split not in ("train", "test"):
        raise DataError(f"split={split!r}; use 'train' or 'test'.")
    shaven = 0.4
    beards = len(FACIAL_HAIR) - 1
    while True:
        identity = Identity(
            hair=_choose(rng, HAIR),
            hair_color=_choose(rng, HAIR_COLOR),
            skin=_choose(rng, SKIN),
            facial_hair=_choose(rng, FACIAL_HAIR, [shaven] + [(1 - shaven) / beards] * beards),
        )
        if split_of(identity) == split:
            return identity


def sample_scene(rng: np.random.Generator, identity: Identity | None = None) -> Scene:
    """One scene, attributes uniform and independent but for glasses (40 % none) and the eyes behind sunglasses; here every
    scene fits every `identity`."""
    glasses = _choose(rng, GLASSES, [0.4, 0.2, 0.2, 0.2])
    eyes = list(EYES)[rng.integers(len(EYES) - 1)]
    return Scene(
        eyes="hidden" if glasses == "sunglasses" else eyes,
        mouth=_choose(rng, MOUTH),
        clothes=_choose(rng, CLOTHES),
        clothes_color=_choose(rng, CLOTHES_COLOR),
        glasses=glasses,
        background=_choose(rng, BACKGROUND),
    )


_MOUTH_WORDS = {
    "smile": "smiling", "faint smile": "with a faint smile", "straight": "with a straight mouth", "frown": "frowning",
    "scream": "screaming", "tongue": "sticking out the tongue", "clenched teeth": "with clenched teeth",
}  # fmt: skip
_GLASSES_WORDS = {"sunglasses": "sunglasses", "eyepatch": "an eyepatch"}
_EYES_WORDS = {"winking": "winking", "rolling": "rolling the eyes", "squinting": "squinting"}


def phrases(scene: Any, rng: np.random.Generator | None) -> list[str]:
    """A scene, of this world or of a wider one, as phrases in the canonical order; with a generator, wordings vary."""

    def one_of(*wordings: str) -> str:
        return wordings[0] if rng is None else wordings[rng.integers(len(wordings))]

    article = "" if scene.clothes == "overalls" else "a "
    clothes = f"{article}{scene.clothes_color} {scene.clothes}"
    glasses = _GLASSES_WORDS.get(scene.glasses, f"{scene.glasses} glasses")
    article = "an" if scene.background[0] in "aeiou" else "a"
    background = f"{article} {scene.background} background"
    eyes = _EYES_WORDS.get(scene.eyes, f"with {scene.eyes} eyes")
    return [
        _MOUTH_WORDS[scene.mouth],
        *([] if scene.eyes == "hidden" else [eyes]),
        one_of(f"wearing {clothes}", f"in {clothes}", f"dressed in {clothes}"),
        "without glasses" if scene.glasses == "none" else one_of(f"with {glasses}", f"wearing {glasses}"),
        one_of(f"against {background}", f"on {background}", f"in front of {background}"),
    ]


def caption(
    scene: Scene, rng: np.random.Generator | None = None, subject: str = CLASS_PHRASE, omit: float = 0.1
) -> str:
    """``"a portrait of a person, smiling, with open eyes, ..."``; never names the identity.

    Without `rng` the one canonical caption: every visible attribute, fixed order. With `rng` the wording and order
    vary, and each attribute is left out with probability `omit`. `subject` replaces the class phrase, as in ``"a sks
    person"``.
    """
    return ", ".join([f"a portrait of {subject}", *shuffled(phrases(scene, rng), rng, omit)])


def shuffled(parts: list[str], rng: np.random.Generator | None, omit: float) -> list[str]:
    """With a generator: the parts in any order, each left out with probability `omit`."""
    if rng is None:
        return parts
    parts = [p for p in parts if rng.random() >= omit]
    return [parts[i] for i in rng.permutation(len(parts))]


def vocabulary() -> list[str]:
    """Every word a caption can hold, and the placeholders, each once, in a stable order."""
    words: dict[str, None] = {}
    for glasses, eyes in product(GLASSES, EYES):
        if (eyes == "hidden") != (glasses == "sunglasses"):
            continue
        for mouth, clothes, color, background in zip(*_cycled(MOUTH, CLOTHES, CLOTHES_COLOR, BACKGROUND), strict=True):
            scene = Scene(eyes, mouth, clothes, color, glasses, background)
            for seed in range(3):
                words.update(dict.fromkeys(caption(scene, np.random.default_rng(seed), omit=0).split()))
    cleaned = {part: None for word in words for part in word.strip(",").replace("-", " ").split()}
    extra = (
        "man",
        "woman",
        "picture",
        "photo",
        "face",
        "light",
        "dark",
        "and",
        "its",
        "his",
        "her",
        "shirt",
        "glasses",
    )
    return list(dict.fromkeys([*cleaned, *extra, *PLACEHOLDERS]))


def _cycled(*columns: dict) -> list[list[str]]:
    """Columns repeated to the length of the longest, so that every word appears."""
    longest = max(map(len, columns))
    return [[list(c)[i % len(c)] for i in range(longest)] for c in columns]


@cache
def drawing_tools(style: str = "avataaars") -> tuple[Any, Any, Any]:
    """(Avatar class, the loaded style, resvg's svg_to_bytes), imported on first use."""
    try:
        from importlib.resources import files

        import resvg_py
        from dicebear import Avatar, Style

        definition = files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8")
    except (ImportError, FileNotFoundError) as error:
        raise MissingExtraError(
            f"Drawing portraits needs DiceBear and resvg ({error}): pip install 'smidgen[world]'"
        ) from error
    return Avatar, Style(json.loads(definition)), resvg_py.svg_to_bytes


def _options(identity: Identity, scene: Scene) -> dict:
    """DiceBear's options: everything is fixed, nothing is left to its own random choice. Crop: 1.2x, moved 2 %
    down."""
    beard, glasses = FACIAL_HAIR[identity.facial_hair], GLASSES[scene.glasses]
    return {
        "seed": "smidgen", "size": SIZE, "scale": 1.2, "translateY": 2,
        "topVariant": HAIR[identity.hair], "hairColor": HAIR_COLOR[identity.hair_color], "hatColor": "#25557c",
        "skinColor": SKIN[identity.skin],
        "facialHairVariant": beard or "beardLight", "facialHairProbability": 100 if beard else 0,
        "facialHairColor": HAIR_COLOR[identity.hair_color],
        "eyesVariant": EYES[scene.eyes], "mouthVariant": MOUTH[scene.mouth], "eyebrowsVariant": BROWS[scene.mouth],
        "clothesVariant": CLOTHES[scene.clothes], "clothesColor": CLOTHES_COLOR[scene.clothes_color],
        "accessoriesVariant": glasses or "round", "accessoriesProbability": 100 if glasses else 0,
        "accessoriesColor": "#262e33", "backgroundColor": BACKGROUND[scene.background],
    }  # fmt: skip


def drawing(identity: Identity, scene: Scene, placement: Mapping[str, float] | None = None) -> str:
    """The portrait as SVG; ``placement`` holds DiceBear's scale, rotate, translateX, translateY where they differ."""
    avatar, style, _ = drawing_tools()
    return str(avatar(style, _options(identity, scene) | dict(placement or {})).to_string())


def rasterize(svg: str, size: int = SIZE):
    """An SVG as an RGB ``PIL.Image`` of size x size."""
    from PIL import Image

    png = drawing_tools()[2](svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def render(identity: Identity, scene: Scene, size: int = SIZE):
    """The portrait as an RGB ``PIL.Image`` of size x size. Deterministic, offline, about 4 ms."""
    return rasterize(drawing(identity, scene), size)


def write_subject(folder: str | os.PathLike, identity: Identity, n: int, seed: int, size: int = SIZE) -> list[Scene]:
    """Write an imagefolder of one subject: ``000.png`` ... and ``metadata.jsonl`` (file_name, text). Returns the
    scenes.

    The captions name the scene in full with the class phrase; they never name the identity.
    """
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    write_folder(folder, ((render(identity, scene, size), caption(scene)) for scene in scenes))
    return scenes


def write_folder(folder: str | os.PathLike, captioned: Iterable[tuple[Any, str]]) -> None:
    """Pictures and their captions as an imagefolder."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, text) in enumerate(captioned):
        picture.save(root / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": text}))
    replace_file(root / "metadata.jsonl", "\n".join(lines) + "\n")


def attribute_codes(record: Identity | Scene) -> dict[str, int]:
    """Attribute name -> index of its word in `ATTRIBUTES`."""
    return {f.name: list(ATTRIBUTES[f.name]).index(getattr(record, f.name)) for f in fields(record)}
