"""The words of the wide world and how each drawing style draws them.

All words of `smidgen.bases.embedded.words` are here and mean the same. A style is in when its drawings may be passed on
and its parts are what our words say; what it has no part for, it does not draw. Values that cannot be told apart at 64
pixels are left out.
"""

from dataclasses import dataclass, field

from smidgen.bases.embedded import words

HAIR_COLOR, SKIN, CLOTHES_COLOR, BACKGROUND = words.HAIR_COLOR, words.SKIN, words.CLOTHES_COLOR, words.BACKGROUND
BROWS = {"plain": None, "flat": "flatNatural", "slanted": "angryNatural"}  # plain ones follow the mouth
HAT = {
    "none": None, "hat": "hat", "hijab": "hijab", "turban": "turban", "beanie": "winterHat02",
    "ushanka": "winterHat1",
}  # fmt: skip
HAT_COLOR = {"none": None, **CLOTHES_COLOR}
FRAMING = {"portrait": 1.0, "closeup": 1.2, "miniature": 0.75}  # times the size of a portrait
HEAD = {"straight": 0, "tilted left": -14, "tilted right": 14}  # degrees clockwise
LIGHT = {"normal": (1, 1, 1), "grey": None, "warm": (1, 0.8, 0.55), "cold": (0.62, 0.82, 1), "dim": (0.5, 0.5, 0.5)}
"""What each channel is multiplied by; grey keeps the luma alone."""


@dataclass(frozen=True)
class Style:
    """A drawing style: DiceBear's name, the word a caption has for it, its size, and word -> part for each attribute."""

    source: str
    word: str  # before "portrait"
    scale: float
    down: float
    options: dict[str, str]  # attribute -> what DiceBear calls it
    hair: dict
    facial_hair: dict
    brows: dict
    eyes: dict
    mouth: dict
    clothes: dict
    glasses: dict
    hat: dict = field(default_factory=lambda: {"none": None})
    fixed: dict = field(default_factory=dict)

    def draws(self, attribute: str) -> dict:
        """Word -> part of an attribute whose words depend on the style; empty for the others."""
        return getattr(self, attribute, {}) if attribute in PARTS else {}


PARTS = ("hair", "facial_hair", "brows", "eyes", "mouth", "clothes", "glasses", "hat")
STYLE = {
    "plain": Style(
        "avataaars", "", 1.2, 2,
        {"hair": "top", "facial_hair": "facialHair", "brows": "eyebrows", "glasses": "accessories", "skin": "skin",
         "clothes_color": "clothes"},
        {**words.HAIR, "bald": None}, words.FACIAL_HAIR, BROWS, words.EYES, words.MOUTH, words.CLOTHES,
        {**words.GLASSES, "eyepatch": "eyepatch"}, HAT, {"accessoriesColor": "#262e33"},
    ),
    "inked": Style(
        "micah", "inked", 1.0, 0,
        {"hair": "hair", "facial_hair": "facialHair", "brows": "eyebrows", "glasses": "glasses", "skin": "base",
         "clothes_color": "shirt"},
        {"long": "full", "bob": "pixie", "strand": "dannyPhantom", "short wavy": "fonze",
         "bald": "mrClean"},
        {"none": None, "full beard": "beard"}, {"plain": "up"}, {"open": "eyes", "closed": "smiling"},
        {"smile": "laughing", "faint smile": "smile", "frown": "frown", "scream": "surprised",
         "clenched teeth": "nervous"},
        {"t-shirt": "open", "sweater": "crew", "blazer": "collared"}, {"none": None, "round": "round", "square": "square"},
        fixed={"noseVariant": "curve", "earsVariant": "attached", "earringsProbability": 0,
               "glassesColor": "#262e33"},
    ),
}  # fmt: skip
"""Our word -> a style: "Avataaars" by Pablo Stanley (free for personal and commercial use) and "Avatar Illustration System"
by Micah Lanier (CC BY 4.0), as remixed by DiceBear."""


def _all(attribute: str) -> dict:
    """Every style's words of an attribute, the plain style's first."""
    return {word: None for style in STYLE.values() for word in style.draws(attribute)}


IDENTITY_ATTRIBUTES: dict[str, dict] = {
    "hair": _all("hair"), "hair_color": HAIR_COLOR, "skin": SKIN, "facial_hair": _all("facial_hair"),
    "brows": BROWS,
}  # fmt: skip
SCENE_ATTRIBUTES: dict[str, dict] = {
    "eyes": _all("eyes"), "mouth": _all("mouth"), "clothes": _all("clothes"), "clothes_color": CLOTHES_COLOR,
    "glasses": _all("glasses"), "background": BACKGROUND, "hat": HAT, "hat_color": HAT_COLOR, "framing": FRAMING,
    "head": HEAD, "light": LIGHT, "style": STYLE,
}  # fmt: skip
ATTRIBUTES = {**IDENTITY_ATTRIBUTES, **SCENE_ATTRIBUTES}
