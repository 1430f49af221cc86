"""The wide world: people of any hair and skin colour, hats that hide hair, tilted heads, crops, light, two styles.

Same functions as `smidgen.bases.embedded.world`, and every person, scene and caption of that world is one of this one,
drawn to the same pixels. Wider are: hair colour and skin, any ``"#rrggbb"`` or a word; eyebrows; and in the scene, where
captions name them, hats and their colour, the framing, the tilt of the head, the light and the drawing style.

Held out are people (one in twelve, `split_of` says "test") and ranges of colours (`HELD`, "range"), so that an unseen
colour can be told from an unseen person.

Example:
    >>> rng = np.random.default_rng(0)
    >>> person = sample_identity(rng)
    >>> scene = sample_scene(rng, person)
    >>> "portrait" in caption(Scene("open", "smile", "hoodie", "red", "none", "teal", light="grey", style="inked"))
    Traceback (most recent call last):
    smidgen.errors.DataError: The style 'inked' does not draw clothes='hoodie'. It draws 't-shirt', 'sweater', 'blazer'.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from smidgen.bases.embedded import colors, world
from smidgen.bases.embedded.wide_words import (
    ATTRIBUTES,
    BACKGROUND,
    BROWS,
    CLOTHES_COLOR,
    FRAMING,
    HAIR_COLOR,
    HAT,
    HEAD,
    IDENTITY_ATTRIBUTES,
    LIGHT,
    PARTS,
    SCENE_ATTRIBUTES,
    SKIN,
    STYLE,
)
from smidgen.bases.embedded.words import BROWS as BROWS_OF_MOUTH
from smidgen.bases.embedded.world import CLASS_PHRASE, PLACEHOLDERS, SIZE
from smidgen.errors import DataError

__all__ = ["ATTRIBUTES", "CLASS_PHRASE", "IDENTITY_ATTRIBUTES", "PLACEHOLDERS", "SCENE_ATTRIBUTES", "SIZE"]

Split = Literal["train", "test", "range"]
LICENCE = (
    f"{world.LICENCE}, and in the style Avatar Illustration System by Micah Lanier, CC BY 4.0, both remixed by DiceBear"
)
FREE = ("hair_color", "skin")
COLORS = ("hair_color", "skin", "clothes_color", "background", "hat_color")
"""Attributes that are colours; those of `FREE` may also be ``"#rrggbb"``."""
HELD = {  # free colour -> (a colour, the radius in Lab around it that no training person has)
    "hair_color": (("#1f9d94", 20.0), ("#8a8f3c", 16.0), ("#c13a7c", 20.0)),
    "skin": (("#7f9f6f", 18.0), ("#7d7fb8", 18.0), ("#9c7a68", 5.0)),
}
MARGIN = 4.0  # of Lab, around a named colour: there a person is no other person


class _Record(world.Record):
    words = ATTRIBUTES
    free = FREE


@dataclass(frozen=True)
class Identity(_Record):
    """Who a person is; never captioned."""

    hair: str
    hair_color: str
    skin: str
    facial_hair: str
    brows: str = "plain"


@dataclass(frozen=True)
class Scene(_Record):
    """What a caption may name. Eyes are "hidden" behind sunglasses, a hat's colour is "none" without a hat, only there."""

    eyes: str
    mouth: str
    clothes: str
    clothes_color: str
    glasses: str
    background: str
    hat: str = "none"
    hat_color: str = "none"
    framing: str = "portrait"
    head: str = "straight"
    light: str = "normal"
    style: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.eyes == "hidden") != (self.glasses == "sunglasses"):
            raise DataError(
                f"eyes={self.eyes!r} with glasses={self.glasses!r}: eyes are hidden by sunglasses, only there."
            )
        if (self.hat == "none") != (self.hat_color == "none"):
            raise DataError(f"hat={self.hat!r} with hat_color={self.hat_color!r}: give both, or 'none' for both.")
        _drawn_by(self.style, self.as_dict())


def _drawn_by(style: str, words: Mapping[str, str]) -> None:
    for name, word in words.items():
        parts = STYLE[style].draws(name)
        if name in PARTS and word not in parts:
            known = ", ".join(map(repr, parts))
            raise DataError(f"The style {style!r} does not draw {name}={word!r}. It draws {known}.")


def styles_for(identity: Identity) -> list[str]:
    """The styles that can draw a person; "plain" can draw everyone."""
    words = {name: word for name, word in identity.as_dict().items() if name in PARTS}
    return [s for s, style in STYLE.items() if all(word in style.draws(name) for name, word in words.items())]


def color_of(record: Identity | Scene, name: str) -> str | None:
    """The ``"#rrggbb"`` of a colour attribute; None for the hat's where there is no hat."""
    value = getattr(record, name)
    return value if value.startswith("#") else ATTRIBUTES[name][value]


def _cell(name: str, value: str) -> str:
    """What of a colour decides who a person is: the word if it is one or next to one, else its place in a grid of
    Lab."""
    if not value.startswith("#"):
        return value
    color = colors.lab(value)
    word, distance = colors.nearest(color, ATTRIBUTES[name])
    return word if distance < MARGIN else ",".join(str(int(v // 12)) for v in color)


def in_held_range(identity: Identity) -> bool:
    """Whether hair colour or skin lies in a range that is held out of training."""
    for name, ranges in HELD.items():
        here = colors.lab(str(color_of(identity, name)))
        if any(np.linalg.norm(here - colors.lab(middle)) < radius for middle, radius in ranges):
            return True
    return False


def split_of(identity: Identity) -> Split:
    """ "range" for a held-out colour, else "test" for one identity in twelve, by a hash; people of the smaller world keep their
    split, and people whose colours differ by a shade, or by the eyebrows alone, share it."""
    if in_held_range(identity):
        return "range"
    words = (
        identity.hair,
        _cell("hair_color", identity.hair_color),
        _cell("skin", identity.skin),
        identity.facial_hair,
    )
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 12 == 0 else "train"


def seen(identity: Identity, scene: Scene) -> dict[str, bool]:
    """Attribute name -> whether the picture tells it: a hat hides the hair, sunglasses the eyes, grey light every colour's
    name."""
    colored = scene.light != "grey"
    hair, beard = scene.hat == "none", identity.facial_hair != "none"
    expressive = scene.mouth not in ("straight", "clenched teeth")  # whose own brows look like another person's
    return dict.fromkeys(ATTRIBUTES, True) | {
        "hair": hair,
        "hair_color": colored and ((hair and identity.hair != "bald") or beard),
        "skin": colored,
        "brows": scene.style == "plain" and scene.glasses != "sunglasses" and expressive,
        "eyes": scene.eyes != "hidden",
        "clothes_color": colored,
        "background": colored,
        "hat_color": colored,
    }


def _choose(rng: np.random.Generator, words: Any, p: list[float] | None = None) -> str:
    return str(list(words)[rng.choice(len(words), p=p)])


def _anywhere(rng: np.random.Generator) -> np.ndarray:
    while True:
        color = np.array([rng.uniform(15, 92), *rng.uniform(-70, 80, 2)])
        if colors.shown(color):
            return color


def _free_color(rng: np.random.Generator, name: str, fantastic: float) -> str:
    """A colour near a named one, or with probability `fantastic` any at all, uniform in Lab."""
    if rng.random() < fantastic:
        return colors.hexadecimal(_anywhere(rng))
    near = colors.lab(ATTRIBUTES[name][_choose(rng, ATTRIBUTES[name])])
    return colors.hexadecimal(near + rng.normal(0, (8, 6, 6)))


def sample_identity(rng: np.random.Generator, split: Split = "train") -> Identity:
    """One identity of the split: 40 % of the colours are named ones, half of the other hair colours and a third of the
    skins fantastic; 40 % of faces are shaven, and half of the eyebrows follow the mouth. "range" has a held-out colour."""
    if split not in ("train", "test", "range"):
        raise DataError(f"split={split!r}; use 'train', 'test' or 'range'.")
    facial_hair = IDENTITY_ATTRIBUTES["facial_hair"]
    while True:
        hair_color = _choose(rng, HAIR_COLOR) if rng.random() < 0.4 else _free_color(rng, "hair_color", 0.5)
        skin = _choose(rng, SKIN) if rng.random() < 0.4 else _free_color(rng, "skin", 0.35)
        identity = Identity(
            hair=_choose(rng, IDENTITY_ATTRIBUTES["hair"]),
            hair_color=hair_color,
            skin=skin,
            facial_hair=_choose(rng, facial_hair, [0.4] + [0.6 / (len(facial_hair) - 1)] * (len(facial_hair) - 1)),
            brows=_choose(rng, BROWS, [0.5, 0.25, 0.25]),
        )
        shades = [colors.lab(str(color_of(identity, name))) for name in FREE]
        if np.linalg.norm(shades[0] - shades[1]) > 10 and split_of(identity) == split:
            return identity


def sample_scene(rng: np.random.Generator, identity: Identity | None = None) -> Scene:
    """One scene. With `identity` a third of the scenes are in another style, where one can draw the person; without, all
    are plain and fit everyone. At most two of hat, tilted head and light are out of the ordinary, so that a caption stays short."""
    others = [s for s in styles_for(identity) if s != "plain"] if identity else []
    style = _choose(rng, others) if others and rng.random() < 1 / 3 else "plain"
    draws = STYLE[style].draws
    glasses = _choose(rng, draws("glasses")) if rng.random() < 0.6 else "none"
    eyes = _choose(rng, [word for word in draws("eyes") if word != "hidden"])
    hat = _choose(rng, [h for h in draws("hat") if h != "none"]) if style == "plain" and rng.random() < 0.3 else "none"
    head = _choose(rng, HEAD, [0.7, 0.15, 0.15])
    light = _choose(rng, LIGHT, [0.6, 0.1, 0.1, 0.1, 0.1])
    return Scene(
        eyes="hidden" if glasses == "sunglasses" else eyes,
        mouth=_choose(rng, draws("mouth")),
        clothes=_choose(rng, draws("clothes")),
        clothes_color=_choose(rng, CLOTHES_COLOR),
        glasses=glasses,
        background=_choose(rng, BACKGROUND),
        hat=hat,
        hat_color="none" if hat == "none" else _choose(rng, CLOTHES_COLOR),
        framing=_choose(rng, FRAMING, [0.6, 0.2, 0.2]),
        head="straight" if hat != "none" and light != "normal" else head,
        light=light,
        style=style,
    )


def caption(
    scene: Scene, rng: np.random.Generator | None = None, subject: str = CLASS_PHRASE, omit: float = 0.1
) -> str:
    """As `smidgen.bases.embedded.world.caption`, then hat, tilt and light where they are out of the ordinary; framing and
    style stand at the head: ``"an inked closeup of a person, smiling, ..."``. They are not left out."""
    parts = world.phrases(scene, rng)
    if scene.hat != "none":
        parts.append(f"in a {scene.hat_color} {scene.hat}")
    if scene.head != "straight":
        parts.append(scene.head)
    if scene.light != "normal":
        parts.append("in grey" if scene.light == "grey" else f"in {scene.light} light")
    picture = f"{STYLE[scene.style].word} {scene.framing}".strip()
    article = "an" if picture[0] in "aeiou" else "a"
    return ", ".join([f"{article} {picture} of {subject}", *world.shuffled(parts, rng, omit)])


def vocabulary() -> list[str]:
    """Every word a caption can hold, those of the smaller world first and in its order."""
    styles = [style.word for style in STYLE.values()]
    named: list[Iterable[str]] = [HAT, HEAD, FRAMING, LIGHT, styles, ["an", "eyepatch", "in"]]
    return list(dict.fromkeys([*world.vocabulary(), *(w for group in named for word in group for w in word.split())]))


def _options(identity: Identity, scene: Scene) -> dict:
    """DiceBear's options; nothing is left to its own random choice."""
    style = STYLE[scene.style]
    words = {**identity.as_dict(), **scene.as_dict()}
    hair_color = str(color_of(identity, "hair_color"))
    found: dict[str, Any] = {
        "seed": "smidgen", "size": SIZE, "scale": round(style.scale * FRAMING[scene.framing], 3), "rotate": HEAD[scene.head],
        "translateX": 0, "translateY": _down(style.down, scene.framing), "backgroundColor": BACKGROUND[scene.background],
        "hairColor": hair_color, "facialHairColor": hair_color, "eyebrowsColor": "#000000",
        f"{style.options['skin']}Color": color_of(identity, "skin"),
        f"{style.options['clothes_color']}Color": CLOTHES_COLOR[scene.clothes_color],
        **style.fixed,
    }  # fmt: skip
    for name in ("eyes", "mouth", "clothes", "facial_hair", "hair", "brows"):
        part, called = style.draws(name)[words[name]], style.options.get(name, name)
        if name == "brows" and scene.style == "plain":
            part = part or BROWS_OF_MOUTH[scene.mouth]
        if part:
            found[f"{called}Variant"] = part
        if name in ("hair", "facial_hair"):
            found[f"{called}Probability"] = 100 if part else 0
    glasses, called = style.draws("glasses")[scene.glasses], style.options["glasses"]
    found |= {f"{called}Probability": 100 if glasses else 0, f"{called}Variant": glasses or "round"}
    if scene.hat != "none":
        found |= {"topVariant": HAT[scene.hat], "topProbability": 100, "hatColor": color_of(scene, "hat_color")}
    elif scene.style == "plain":
        found["hatColor"] = "#25557c"
    return found


def _down(down: float, framing: str) -> float:
    """Percent of the picture: a smaller figure stands on the lower edge."""
    return round(50 * (1 - FRAMING[framing]) + down, 2) if framing == "miniature" else down


def drawing(identity: Identity, scene: Scene, placement: Mapping[str, float] | None = None) -> str:
    """The portrait as SVG in normal light; ``placement`` holds DiceBear's scale, rotate, translateX, translateY where
    they differ.

    Raises:
        DataError: the scene's style does not draw this person.
    """
    _drawn_by(scene.style, identity.as_dict())
    style = STYLE[scene.style]
    avatar, loaded, _ = world.drawing_tools(style.source)
    return str(avatar(loaded, _options(identity, scene) | dict(placement or {})).to_string())


def placement(scene: Scene, zoom: float = 1.0, right: float = 0.0, down: float = 0.0) -> dict[str, float]:
    """For `drawing`: the portrait as its framing has it, but ``zoom`` times as large, moved by percent of the picture."""
    style = STYLE[scene.style]
    scale, lower = style.scale * FRAMING[scene.framing] * zoom, _down(style.down, scene.framing)
    return {"scale": round(scale, 3), "translateX": round(right, 2), "translateY": round(lower + down, 2)}


def lit(picture: Any, light: str) -> Any:
    """An RGB ``PIL.Image`` in one of the lights of `LIGHT`."""
    from PIL import Image

    if light == "normal":
        return picture
    tint = LIGHT[light]
    if tint is None:
        return picture.convert("L").convert("RGB")
    return Image.fromarray((np.asarray(picture) * np.array(tint)).round().astype(np.uint8))


def render(identity: Identity, scene: Scene, size: int = SIZE) -> Any:
    """The portrait as an RGB ``PIL.Image`` of size x size. Deterministic, offline."""
    return lit(world.rasterize(drawing(identity, scene), size), scene.light)


def in_a_hat(attributes: Mapping[str, str], scene: Any, rng: np.random.Generator) -> Any:
    """The portrait of a person of either world, in a scene of either, under a hat of any colour; an RGB ``PIL.Image``."""
    words = {"hat": _choose(rng, [hat for hat in HAT if hat != "none"]), "hat_color": _choose(rng, CLOTHES_COLOR)}
    return render(Identity(**attributes), Scene(**(scene.as_dict() | {"style": "plain"} | words)))


def write_subject(folder: str | os.PathLike, identity: Identity, n: int, seed: int, size: int = SIZE) -> list[Scene]:
    """As `smidgen.bases.embedded.world.write_subject`, in scenes of this world."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, identity) for _ in range(n)]
    world.write_folder(folder, ((render(identity, scene, size), caption(scene)) for scene in scenes))
    return scenes


def attribute_codes(record: Identity | Scene) -> dict[str, int]:
    """Attribute name -> index of its word in `ATTRIBUTES`; a free colour has that of the nearest word."""
    words = {f.name: getattr(record, f.name) for f in fields(record)}
    for name in FREE:
        if words.get(name, "").startswith("#"):
            words[name] = colors.nearest(colors.lab(words[name]), ATTRIBUTES[name])[0]
    return {name: list(ATTRIBUTES[name]).index(word) for name, word in words.items()}
