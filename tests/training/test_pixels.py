"""One reader of picture files: right pixels whatever the file holds, or a refusal that says why."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from smidgen.errors import DataError
from smidgen.tasks.data import pixels
from smidgen.tasks.data.pixels import decode

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)


def drawn(mode="RGB", size=(40, 30)):
    image = Image.new("RGB", size, (30, 90, 200))
    image.paste((220, 40, 40), (10, 5, 30, 25))
    image.paste((255, 255, 255), (0, 0, 6, 6))
    return image.convert(mode)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def greys(path):
    found = np.asarray(decode(path).image)
    assert (found == found[..., :1]).all()
    return found[..., 0].astype(int)


@pytest.mark.parametrize("name, image", [
    ("16.png", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    ("16.tiff", Image.fromarray((RAMP * 65535).astype(np.uint16))),
    ("big endian.tiff", Image.fromarray((RAMP * 65535).astype(">u2"))),
    ("32 holding 16.tiff", Image.fromarray((RAMP * 65535).astype(np.int32))),
    ("32 holding 8.tiff", Image.fromarray((RAMP * 255).astype(np.int32))),
    ("16.pgm", Image.fromarray((RAMP * 65535).astype(np.int32))),
    ("float.tiff", Image.fromarray(RAMP.astype(np.float32))),
    ("float of 255.tiff", Image.fromarray((RAMP * 255).astype(np.float32))),
    ("float.pfm", Image.fromarray(RAMP.astype(np.float32))),
    ("8.png", Image.fromarray((RAMP * 255).astype(np.uint8))),
])  # fmt: skip
def test_grey_is_scaled_by_what_its_numbers_can_hold(tmp_path, name, image):
    if Image.registered_extensions().get(Path(name).suffix) not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {Path(name).suffix}")
    found = greys(saved(image, tmp_path / name))
    assert abs(found - RAMP * 255).max() <= 1.0 and found.max() == 255


def test_twelve_bits_are_scaled_by_their_own_white(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[258] = 12
    raw = (RAMP * 4095).astype(np.uint16)
    packed = bytearray()
    for one, two in raw.reshape(-1, 2).tolist():
        packed += bytes([one >> 4, (one & 15) << 4 | two >> 8, two & 255])
    entries = [
        (256, 4, 32),
        (257, 4, 32),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 0),
        (277, 3, 1),
        (278, 4, 32),
    ]
    entries.append((279, 4, len(packed)))
    start = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else v) for tag, kind, v in entries)
    (tmp_path / "12.tiff").write_bytes(
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0" + bytes(packed)
    )
    assert abs(greys(tmp_path / "12.tiff") - RAMP * 255).max() <= 1.0


@pytest.mark.parametrize("values, message", [
    (RAMP * 2 - 1, "run from -1 to 1, and nothing says which of them is white"),
    (RAMP * 3.5, "run from 0 to 3.5"),
    (RAMP * 1e6, "run from 0 to 1e\\+06"),
    (np.where(RAMP < 0.5, np.nan, RAMP), "not finite"),
])  # fmt: skip
def test_numbers_of_no_known_scale_are_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=message):
        decode(saved(Image.fromarray(values.astype(np.float32)), tmp_path / "a.tiff"))


@pytest.mark.parametrize("name, mode", [
    ("a.png", "RGB"), ("a.png", "L"), ("a.png", "1"), ("a.png", "P"), ("a.png", "LA"), ("a.png", "RGBA"), ("a.jpg", "CMYK"),
    ("a.tiff", "CMYK"), ("a.tiff", "LAB"), ("a.jpg", "YCbCr"), ("a.gif", "P"), ("a.webp", "RGBA"), ("a.bmp", "RGB"),
    ("a.tga", "RGBA"), ("a.jp2", "RGB"), ("a.jfif", "RGB"), ("a.jpe", "RGB"), ("a.ppm", "RGB"), ("a.ico", "RGBA"), ("a.qoi", "RGB"),
])  # fmt: skip
def test_every_mode_and_ending_gives_its_own_colours(tmp_path, name, mode):
    image = drawn(size=(48, 48))
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = image.convert(mode)
    path, ending = tmp_path / name, name.split(".")[1]
    options = {"format": "JPEG2000" if ending == "jp2" else "JPEG"} if ending in ("jfif", "jpe", "jp2") else {}
    options |= (
        {"quality": 98, "subsampling": 0}
        if ending in ("jpg", "jfif", "jpe")
        else {"lossless": True}
        if ending == "webp"
        else {}
    )
    if path.suffix not in pixels.known_endings() or Image.registered_extensions().get(path.suffix) not in Image.SAVE:
        pytest.skip("not a format of this Pillow")
    image.save(path, **options)
    found = decode(path)
    expected = drawn("L", (48, 48)).convert("RGB") if mode in ("L", "LA") else drawn(size=(48, 48))
    tolerance = 255 if mode == "1" else 60 if mode == "P" else 24 if mode == "CMYK" else 8
    assert found.image.mode == "RGB" and found.odd == frozenset()
    difference = abs(np.asarray(found.image, int) - np.asarray(expected, int))
    assert np.percentile(difference, 90) <= tolerance


def test_transparency_lies_on_white_and_none_at_all_is_named(tmp_path):
    half = drawn("RGBA")
    half.paste((0, 0, 0, 0), (20, 0, 40, 30))
    found = decode(saved(half, tmp_path / "half.png"))
    assert found.image.getpixel((30, 2)) == (255, 255, 255) and found.image.getpixel((12, 12)) == (220, 40, 40)
    assert not found.odd
    nothing = drawn("RGBA")
    nothing.putalpha(0)
    assert decode(saved(nothing, tmp_path / "none.png")).odd == {"transparent", "flat"}
    grey = drawn("LA")
    grey.putalpha(0)
    assert "transparent" in decode(saved(grey, tmp_path / "grey.webp")).odd
    palette = drawn("P").convert("P", colors=8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    found = decode(saved(palette, tmp_path / "palette.gif", transparency=palette.getpixel((0, 0))))
    assert found.image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_of_several_frames_the_first_is_taken_and_said(tmp_path, name):
    frames = [drawn(), Image.new("RGB", (40, 30), "black")]
    found = decode(saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:]))
    assert found.odd == {"animated"} and found.image.getpixel((35, 2))[2] > 150


def test_what_shows_nothing_is_named(tmp_path):
    assert decode(saved(Image.new("RGB", (20, 20), (9, 9, 9)), tmp_path / "flat.png")).odd == {"flat"}
    labels = (np.arange(400).reshape(20, 20) % 7).astype(np.uint16)  # a mask saved in 16 bits
    assert decode(saved(Image.fromarray(labels), tmp_path / "labels.png")).odd == {"flat"}
    with pytest.raises(DataError, match="run from 0 to 6"):
        decode(saved(Image.fromarray(labels.astype(np.int32)), tmp_path / "labels.tiff"))


def test_colours_come_to_srgb_by_the_files_own_profile(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert decode(saved(drawn(), tmp_path / "wrong.png", icc_profile=lab)).odd == {"profile"}
    assert decode(saved(drawn(), tmp_path / "damaged.png", icc_profile=b"no profile")).odd == {"profile"}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = decode(saved(drawn(), tmp_path / "srgb.png", icc_profile=srgb))
    assert not found.odd and found.image.tobytes() == drawn().tobytes()
    swapped = decode(saved(drawn(), tmp_path / "swapped.png", icc_profile=_swapped(srgb)))
    red, _, blue = swapped.image.getpixel((12, 12))  # its red primary is blue
    assert not swapped.odd and blue > 150 > red


def _swapped(profile):
    """An RGB profile whose red and blue primaries have changed places."""
    changed = profile.replace(b"rXYZ", b"xxxx").replace(b"bXYZ", b"rXYZ").replace(b"xxxx", b"bXYZ")
    return changed.replace("sRGB".encode("utf-16-be"), "gbrS".encode("utf-16-be"))  # else it is taken at its word


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_every_kind_of_file(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = drawn()
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        found = decode(saved(lying, tmp_path / name, exif=exif)).image
        assert found.size == ((40, 30) if turn < 5 else (30, 40))
        x, y = corners[turn]
        white = found.getpixel((2 + x * (found.width - 5), 2 + y * (found.height - 5)))
        assert min(white) > 220, (name, turn, white)


def _bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def test_what_is_no_picture_is_refused_by_its_reason(tmp_path):
    whole = saved(drawn(size=(300, 300)), tmp_path / "whole.jpg").read_bytes()
    files = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.png": (b"", "it is empty"),
        "text.png": (b"not a picture", "no picture that can be read"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200, "pip install pillow-heif"),
        "bomb.png": (_bomb(11_000), "121|11000x11000 is more than 100 million pixels"),
        "larger.png": (_bomb(60_000), "more than 100 million pixels"),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(x) run\n", "no picture that can be read"),
        "speck.png": (saved(drawn(size=(40, 3)), tmp_path / "s.png").read_bytes(), "40x3 is smaller than 16 pixels"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            decode(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {"folder.png": "a folder", "link.png": "a link to nothing", "pipe.png": "no file"}.items():
        with pytest.raises(DataError, match=message):
            decode(tmp_path / name)


def test_damaged_files_of_every_kind_are_pictures_or_refused(tmp_path):
    """No byte of a picture file makes anything but pixels or a DataError."""
    rng, done = np.random.default_rng(0), 0
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "TGA", "ICO", "PPM", "PCX", "DDS", "SGI"):
        if kind not in Image.SAVE or kind not in pixels.readable_formats():
            continue
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "maker"
        drawn(size=(32, 32)).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}))
        raw = buffer.getvalue()
        for _ in range(25):
            damaged = bytearray(raw)
            for at in rng.integers(0, min(len(raw), 400), rng.integers(1, 6)):
                damaged[at] = rng.integers(256)
            if rng.random() < 0.3:
                damaged = damaged[: rng.integers(len(damaged))]
            try:
                assert decode(io.BytesIO(bytes(damaged))).image.mode == "RGB"
            except DataError as error:
                assert str(error)
            done += 1
    assert done >= 200


def test_no_warning_of_the_library_reaches_the_user(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        palette = drawn("P")
        decode(saved(palette, tmp_path / "a.png", transparency=bytes(range(200))))


def test_an_installed_plugin_adds_its_endings(monkeypatch):
    import sys
    import types

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: (
        Image.register_open("HEIF", lambda *_: None, lambda _: False), Image.register_extension("HEIF", ".heic")
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    for known in (pixels.readable_formats, pixels.known_endings):
        known.cache_clear()
    try:
        assert ".heic" in pixels.known_endings()
    finally:
        monkeypatch.undo()
        Image.OPEN.pop("HEIF"), Image.EXTENSION.pop(".heic"), Image.ID.remove("HEIF")
        for known in (pixels.readable_formats, pixels.known_endings):
            known.cache_clear()
    assert ".heic" not in pixels.known_endings()
