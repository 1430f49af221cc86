"""Emoji drawn by five vendors, labelled by their Unicode group, from npm packages of SVG.

Only emoji that all five vendors drew, so every label has every style. An emoji lies in one split with all its styles, and
of those that differ by gender or hair alone ("man: beard", "woman: beard") the first stands for all, so that no test
picture has its twin in training. Flags are left out.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smidgen.bases.packaged.entry import Packaged, npm
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, needs_extra, write_pictures
from smidgen.errors import DataError

OPENMOJI = npm("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68", 4_339_458)
VENDORS = {
    "noto": npm(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3_102_958
    ),
    "twemoji": npm(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1_555_888
    ),
    "fluent": npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1_172_438,
    ),
    "emojione": npm(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", 687_690
    ),
}
PIXELS = 64
SIZES = {"train": 600, "validation": 120, "test": 240}
"""Emoji; times five styles."""

_OMITTED = {"flags", "component"}
_WHO = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|child|adult)s?\b")
Drawing = Callable[[], str]


def write(folder: Path) -> None:
    groups, drawings = read_emoji()
    splits = draw_splits(groups, SIZES)
    pictures = {
        split: [
            (groups[code], f"{code}-{style}", _png(draw()))
            for code in codes
            for style, draw in sorted(drawings[code].items())
        ]
        for split, codes in splits.items()
    }
    write_pictures(folder, pictures)


def read_emoji() -> tuple[dict[str, str], dict[str, dict[str, Drawing]]]:
    """Group of each emoji that all vendors drew, by code point; and its SVG by style."""
    table = json.loads(contents(OPENMOJI, r"package/data/openmoji\.json")["package/data/openmoji.json"])
    known = {_code(row["hexcode"]): row for row in table if not row["skintone"] and row["group"] not in _OMITTED}
    svgs = contents(OPENMOJI, r"package/color/svg/.*\.svg")
    styles: dict[str, dict[str, Drawing]] = {"openmoji": {_code(Path(n).stem): s.decode for n, s in svgs.items()}}
    codes: dict[str, str] = {}  # by iconify's name, which every set shares and the last does not map to code points
    for style, source in VENDORS.items():
        files = contents(source, r"package/(icons|chars)\.json")
        icons, chars = (json.loads(files[f"package/{name}.json"]) for name in ("icons", "chars"))
        codes |= {name: _code(code) for code, name in chars.items()}
        styles[style] = {codes[name]: _svg_of(icons, name) for name in icons["icons"] if name in codes}
    everywhere = [code for code in known if all(code in drawn for drawn in styles.values())]
    first: dict[tuple[str, str], str] = {}
    for code in everywhere:
        first.setdefault((known[code]["group"], concept(known[code]["annotation"])), code)
    groups = {code: group for (group, _), code in first.items()}
    return groups, {code: {style: drawn[code] for style, drawn in styles.items()} for code in groups}


def concept(annotation: str) -> str:
    """What an emoji shows, whoever it is.

    Example:
        >>> concept("woman: red hair") == concept("man: beard"), concept("man dancing"), concept("keycap: 3")
        (True, 'dancing', 'keycap: 3')
    """
    bare = re.sub(r"\s+", " ", _WHO.sub("", annotation)).strip()
    return "" if bare.startswith(":") else bare


def _code(hexcode: str) -> str:
    """Code points without the variation selector, which vendors write or leave out."""
    return hexcode.lower().replace("-fe0f", "")


def _svg_of(icons: Mapping[str, Any], name: str) -> Drawing:
    def svg() -> str:
        icon = icons["icons"][name]
        left, top, width, height = (
            icon.get(key, icons.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'

    return svg


def _png(svg: str) -> bytes:
    """A square PNG on white, drawn at twice its size."""
    from PIL import Image

    try:
        import resvg_py
    except ImportError as error:
        raise needs_extra("Drawing emoji", "resvg-py") from error
    try:
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * PIXELS, height=2 * PIXELS))
    except Exception as error:  # resvg raises plain exceptions of several kinds
        raise DataError(f"An emoji cannot be drawn ({error}): {svg[:200]}") from error
    picture = Image.open(io.BytesIO(drawn)).convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    canvas.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS).save(buffer, "png")
    return buffer.getvalue()


ENTRY = Packaged(
    name="emoji",
    kind="pictures",
    summary=f"emoji of five vendors at {PIXELS} pixels, labelled by Unicode group (8), split by emoji",
    licence="Apache-2.0 (Noto), CC BY 4.0 (Twemoji, EmojiOne 2), MIT (Fluent), CC BY-SA 4.0 (OpenMoji)",
    attribution="Google (Noto Emoji), Twitter and contributors (Twemoji), Microsoft (Fluent Emoji), Emoji One, OpenMoji; "
    "packaged by Iconify and OpenMoji",
    sources=(OPENMOJI, *VENDORS.values()),
    write=write,
)
