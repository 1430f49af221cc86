"""Stage `render`: draw the world once into ``pictures.npy`` and attribute codes."""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from smidgen.adapters.atomic import new_file
from smidgen.bases.embedded import colors, world, worlds
from smidgen.errors import ConfigError
from smidgen.lab.embedded_base.config import Config

log = logging.getLogger(__name__)
CHUNK = 1000


SPLITS = ("train", "test", "range")  # a place here is part of a picture's seed


def draw_chunk(
    split: str, seed: int, start: int, n: int, name: str = "embedded"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` pictures [n, 64, 64, 3] uint8 of world `name`, codes [n, attributes] int64, and colours [n, COLORS, 3] uint8 where
    the world has free ones (else [n, 0, 3]); each depends on (split, seed, its index) alone. Free
    colours would make every picture another person, so there two in a row show the same one."""
    drawn = worlds.load_world(name)
    free = getattr(drawn, "COLORS", ())
    pictures = np.empty((n, world.SIZE, world.SIZE, 3), np.uint8)
    codes = np.empty((n, len(drawn.ATTRIBUTES)), np.int64)
    shades = np.zeros((n, len(free), 3), np.uint8)
    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS.index(split), start + i])
        who = np.random.default_rng([seed, SPLITS.index(split), (start + i) // 2, 1]) if free else rng
        identity = drawn.sample_identity(who, split)
        scene = drawn.sample_scene(rng, identity)
        pictures[i] = np.asarray(drawn.render(identity, scene))
        words = {**drawn.attribute_codes(identity), **drawn.attribute_codes(scene)}
        codes[i] = [words[name] for name in drawn.ATTRIBUTES]
        for k, attribute in enumerate(free):
            color = drawn.color_of(identity if hasattr(identity, attribute) else scene, attribute)
            shades[i, k] = (0, 0, 0) if color is None else colors.rgb(color)
    return pictures, codes, shades


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"pictures_{split}.npy", folder / f"codes_{split}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    with new_file(path) as beside, beside.open("wb") as file:
        np.save(file, array)


def render(config: Config, folder: Path) -> None:
    """Draw both splits; a split whose files exist in the right size is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = config.drawn()
    sizes_of = {"test": config.test_pictures, "train": config.train_pictures}
    if hasattr(drawn, "HELD"):
        sizes_of["range"] = config.test_pictures
    for split, n in sizes_of.items():
        picture_path, code_path = _paths(folder, split)
        if picture_path.exists() and code_path.exists() and len(kept := np.load(code_path)) == n:
            if kept.shape[1] != len(drawn.ATTRIBUTES):
                raise ConfigError(
                    f"{folder} holds drawings of another world; give the world {config.world!r} its own folder."
                )
            continue
        log.info("drawing %d %s pictures", n, split)
        starts = list(range(0, n, CHUNK))
        sizes = [min(CHUNK, n - s) for s in starts]
        columns = ([split] * len(starts), [config.seed] * len(starts), starts, sizes, [config.world] * len(starts))
        if config.workers > 1:
            with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
                parts = list(pool.map(draw_chunk, *columns))
        else:
            parts = list(map(draw_chunk, *columns))
        found = [np.concatenate(column) for column in zip(*parts, strict=True)]
        if found[2].size:
            save_array(folder / f"colors_{split}.npy", found[2])
        save_array(picture_path, found[0])
        save_array(code_path, found[1])


def load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures [n, 64, 64, 3] uint8, memory mapped; codes [n, attributes] int64)."""
    picture_path, code_path = _paths(folder, split)
    return np.load(picture_path, mmap_mode="r"), np.load(code_path)
