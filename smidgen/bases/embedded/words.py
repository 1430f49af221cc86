"""The words of the world: every attribute's options, as our plain word and as what DiceBear draws.

Options a person cannot tell apart at 64 pixels are left out, and so are hats, which hide the hair.
"""

# Left: our plain word. Right: DiceBear's option or an RGB colour.
HAIR = {
    "big": "bigHair", "bob": "bob", "bun": "bun", "curly": "curly", "curvy": "curvy", "dreads": "dreads",
    "frizzy": "dreads02", "flowers": "frida", "tuft": "frizzle", "fro": "fro", "fro band": "froBand",
    "chin length": "longButNotTooLong", "fringe bob": "miaWallace", "shaggy": "shaggy", "mullet": "shaggyMullet",
    "shaved sides": "shavedSides", "short curly": "shortCurly", "short flat": "shortFlat", "short wavy": "shortWaved",
    "bald top": "sides", "long": "straight01", "long parted": "straight02", "strand": "straightAndStrand",
    "cropped": "theCaesar",
}  # fmt: skip
HAIR_COLOR = {
    "black": "#2c1b18", "brown": "#724133", "auburn": "#a55728", "light brown": "#b58143", "blonde": "#d6b370",
    "platinum": "#ecdcbf", "red": "#c93305", "silver": "#c9c5c5", "pink": "#f59797", "blue": "#3f6fd8",
    "green": "#3fa35c", "purple": "#8a4fc7",
}  # fmt: skip
SKIN = {
    "pale": "#ffdbb4", "light": "#edb98a", "tanned": "#d08b5b", "brown": "#ae5d29", "dark brown": "#8f5b3e",
    "dark": "#614335", "yellow": "#f8d25c",
}  # fmt: skip
FACIAL_HAIR = {
    "none": None, "light beard": "beardLight", "beard": "beardMedium", "full beard": "beardMajestic",
    "fancy moustache": "moustacheFancy", "moustache": "moustacheMagnum",
}  # fmt: skip
EYES = {
    "open": "default", "closed": "closed", "heart": "hearts", "wide": "surprised", "winking": "wink",
    "rolling": "eyeRoll", "crossed": "xDizzy", "squinting": "squint", "hidden": "default",
}  # fmt: skip
MOUTH = {
    "smile": "smile", "faint smile": "twinkle", "straight": "serious", "frown": "sad", "scream": "screamOpen",
    "tongue": "tongue", "clenched teeth": "grimace",
}  # fmt: skip
BROWS = {  # the eyebrows follow the mouth
    "smile": "default", "faint smile": "defaultNatural", "straight": "flatNatural", "frown": "sadConcerned",
    "scream": "raisedExcited", "tongue": "upDown", "clenched teeth": "angry",
}  # fmt: skip
CLOTHES = {
    "t-shirt": "shirtCrewNeck", "v-neck": "shirtVNeck", "blazer": "blazerAndShirt", "hoodie": "hoodie",
    "overalls": "overall", "sweater": "collarAndSweater",
}  # fmt: skip
CLOTHES_COLOR = {
    "red": "#e5383b", "blue": "#2b6cd4", "green": "#2e9e4f", "yellow": "#f7d02c", "purple": "#8338c9",
    "pink": "#ff7ac0", "black": "#262e33", "white": "#f5f5f5",
}  # fmt: skip
GLASSES = {"none": None, "round": "round", "square": "prescription02", "sunglasses": "kurt"}
BACKGROUND = {
    "sky blue": "#8fd3ff", "mint green": "#a8f0c6", "lavender": "#cdb4f5", "lemon yellow": "#fff3a0",
    "navy blue": "#1d3461", "grey": "#9aa0a6", "teal": "#1f9d94", "orange": "#ff9f40",
}  # fmt: skip

IDENTITY_ATTRIBUTES: dict[str, dict] = {
    "hair": HAIR, "hair_color": HAIR_COLOR, "skin": SKIN, "facial_hair": FACIAL_HAIR,
}  # fmt: skip
SCENE_ATTRIBUTES: dict[str, dict] = {
    "eyes": EYES, "mouth": MOUTH, "clothes": CLOTHES, "clothes_color": CLOTHES_COLOR, "glasses": GLASSES,
    "background": BACKGROUND,
}  # fmt: skip
ATTRIBUTES = {**IDENTITY_ATTRIBUTES, **SCENE_ATTRIBUTES}
