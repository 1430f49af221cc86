"""One picture file as upright RGB pixels: the one reader of training pictures, control pictures and photos.

Grey of 16 bits and floating point are scaled by what their numbers can hold, colours are brought to sRGB by the file's
own profile, transparency is laid on white, the turn in the EXIF is done, and of several frames the first is taken.
What has no certain pixels is refused with the reason.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from smidgen.errors import DataError

SMALLEST = 16  # pixels on the shorter side
LARGEST = 100_000_000  # pixels in all
ODD = {
    "animated": "of several frames, of which the first is taken",
    "flat": "with nothing to see: one colour throughout",
    "transparent": "transparent throughout and left out",
    "profile": "whose colour profile cannot be used, taken as sRGB",
}  # what may be odd about a picture, and how a warning says it
FLAT = 8  # of 255 levels: a picture whose channels all vary by less shows nothing
PROGRAMS, VIDEOS = ("EPS",), ("MPEG",)  # Pillow would run Ghostscript on the first
PAGED = ("MPO", "PSD", "ICO", "ICNS", "CUR")  # further frames are previews, layers or other sizes of the same picture
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": ""}  # module -> what registers it besides its import
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_UNREAD = {
    (".heic", ".heif", ".hif"): "needs pillow-heif: pip install pillow-heif",
    (".jxl",): "needs pillow-jxl-plugin: pip install pillow-jxl-plugin",
    (".avif", ".avifs"): "needs a Pillow with AVIF (11.3 or newer)",
    (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"): "a camera's raw file; save it as PNG or JPEG",
    (".svg", ".svgz", ".ai", ".eps", ".ps", ".pdf", ".wmf", ".emf"): "drawing commands, no pixels; save it as PNG",
    (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"): "a video; save stills of it",
}


@dataclass(frozen=True)
class Decoded:
    """An upright RGB picture, and what was odd about its file, of ``ODD``."""

    image: Image.Image
    odd: frozenset[str] = frozenset()
    alpha: Image.Image | None = None  # its opacity (L), where the file has one


def decode(source: str | os.PathLike[str] | IO[bytes], smallest: int = SMALLEST) -> Decoded:
    """The picture in a file.

    Raises:
        DataError: it is no picture, damaged, shorter than ``smallest`` on a side, larger than ``LARGEST`` pixels, or its
            numbers have no known scale. The message is the reason alone; the caller knows the name.
    """
    path = Path(os.fspath(source)) if isinstance(source, str | os.PathLike) else None
    if path is not None and not path.is_file():
        raise DataError(no_file(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of large pictures (the limit below is ours) and damaged EXIF
            with Image.open(path or source, formats=readable_formats()) as image:  # type: ignore[arg-type]
                _check_size(*image.size, smallest)
                image.load()
                return _decoded(image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"it has more than {LARGEST // 1_000_000} million pixels") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(_unidentified(path)) from error
    except MemoryError as error:
        raise DataError("there is not enough memory for it") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise DataError(f"{error or type(error).__name__}".rstrip(".")) from error


def upright(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, as :func:`decode` makes it."""
    return _decoded(image).image


def fit(
    image: Image.Image, size: int | tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scaled to cover ``size`` (width, height; one number: a square) and cropped to its centre."""
    return ImageOps.fit(image, (size, size) if isinstance(size, int) else size, resample)


def kept_by_crop(size: tuple[int, int]) -> float:
    """Share of a picture of ``size`` that its centre square is."""
    return min(size) / max(size)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's formats whose pixels it reads itself, those of installed plugins included."""
    for module, register in PLUGINS.items():
        try:
            found = __import__(module)
            getattr(found, register)() if register else None
        except (ImportError, AttributeError, OSError):
            continue
    Image.init()
    without = {name for name, (kind, _) in Image.OPEN.items() if _is_stub(kind)}
    return tuple(name for name in Image.OPEN if name not in without and name not in PROGRAMS + VIDEOS)


@cache
def known_endings() -> frozenset[str]:
    """Endings of files that are read as pictures, in lower case with their dot."""
    formats = readable_formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in (*formats, "MPO"))


def why_unread(path: Path) -> str:
    """Why no reader takes a file of this ending; "" for endings that nobody would expect to be pictures."""
    return next((why for endings, why in _UNREAD.items() if path.suffix.lower() in endings), "")


def no_file(path: Path) -> str:
    """What is at ``path`` instead of a file."""
    if path.is_dir():
        return "it is a folder"
    if path.is_symlink() and not path.exists():
        return "it is a link to nothing"
    return "it is no file" if path.exists() else "it does not exist"


def _decoded(image: Image.Image) -> Decoded:
    turn, odd = _turn(image), {"animated"} if _is_animated(image) else set()
    solid, alpha = _split(_eight_bits(image))
    profile = image.info.get("icc_profile")
    rgb = _by_profile(solid, profile) if profile else None
    if rgb is None:
        rgb = _plain_rgb(solid)
        odd |= {"profile"} if profile else set()
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
        odd |= set() if alpha.getbbox() else {"transparent"}
    if all(high - low < FLAT for low, high in rgb.getextrema()):  # type: ignore[misc]
        odd.add("flat")
    parts = [part if part is None or turn is None else part.transpose(turn) for part in (rgb, alpha)]
    return Decoded(parts[0], frozenset(odd), parts[1])  # type: ignore[arg-type]


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture without its transparency, and that apart."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return (image.convert("RGB") if image.mode == "P" else image), None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("it holds numbers that are not finite")
    return Image.fromarray(np.clip(values * (255 / _white(image, values)) + 0.5, 0, 255).astype(np.uint8))


def _white(image: Image.Image, values: np.ndarray) -> float:
    """The number that stands for white."""
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))
        return float(2 ** min(16, *bits) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0
    if low >= 0:
        scales = ((1.0, 1.0), (255.0, 255.0), (65535.0, 65535.0))
        for most, white in scales if image.mode == "F" else scales[1:]:
            if high <= most and (white == 1.0 or high > 16):  # 1.5 in floats may be anything
                return white
        if high == 0:
            return 1.0
    raise DataError(f"its numbers run from {low:g} to {high:g}, and nothing says which of them is white")


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        return _by_profile(image, None) or image.convert("RGB")
    return image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """RGB in sRGB of an image in the colours of ``profile`` (none: of Lab); None when it does not fit the image."""
    try:
        from PIL import ImageCms
    except ImportError:  # a Pillow without LittleCMS
        return None
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        if profile and "srgb" in ImageCms.getProfileDescription(own).lower():
            return image.convert("RGB")
        return ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")  # type: ignore[arg-type]
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # the EXIF is damaged, the picture need not be
        return None


def _is_animated(image: Image.Image) -> bool:
    try:
        return image.format not in PAGED and bool(getattr(image, "is_animated", False))
    except Exception:  # its second frame is damaged
        return True


def _check_size(width: int, height: int, smallest: int) -> None:
    if width * height > LARGEST:
        raise DataError(f"{width}x{height} is more than {LARGEST // 1_000_000} million pixels")
    if min(width, height) < smallest:
        raise DataError(f"{width}x{height} is smaller than {smallest} pixels")


def _unidentified(path: Path | None) -> str:
    if path is None:
        return "it is no picture that can be read"
    if path.stat().st_size == 0:
        return "it is empty"
    why = why_unread(path)
    return f"it is no picture that can be read{f' ({why})' if why else ''}"


def _is_stub(kind: object) -> bool:
    """Whether Pillow knows the format by sight and leaves its pixels to others."""
    return isinstance(kind, type) and issubclass(kind, ImageFile.StubImageFile)
