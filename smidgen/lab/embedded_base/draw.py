"""Stage `render`: draw the world once into ``pictures.npy`` and attribute codes."""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from smidgen.adapters.atomic import new_file
from smidgen.bases.embedded import world
from smidgen.lab.embedded_base.config import Config

log = logging.getLogger(__name__)
CHUNK = 1000


def draw_chunk(split: world.Split, seed: int, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` pictures [n, 64, 64, 3] uint8 and codes [n, attributes] int64; each depends on (split, seed, its index)
    alone."""
    pictures = np.empty((n, world.SIZE, world.SIZE, 3), np.uint8)
    codes = np.empty((n, len(world.ATTRIBUTES)), np.int64)
    for i in range(n):
        rng = np.random.default_rng([seed, split == "test", start + i])
        identity, scene = world.sample_identity(rng, split), world.sample_scene(rng)
        pictures[i] = np.asarray(world.render(identity, scene))
        words = {**world.attribute_codes(identity), **world.attribute_codes(scene)}
        codes[i] = [words[name] for name in world.ATTRIBUTES]
    return pictures, codes


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"pictures_{split}.npy", folder / f"codes_{split}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    with new_file(path) as beside, beside.open("wb") as file:
        np.save(file, array)


def render(config: Config, folder: Path) -> None:
    """Draw both splits; a split whose files exist in the right size is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes_of: dict[world.Split, int] = {"test": config.test_pictures, "train": config.train_pictures}
    for split, n in sizes_of.items():
        picture_path, code_path = _paths(folder, split)
        if picture_path.exists() and code_path.exists() and len(np.load(code_path)) == n:
            continue
        log.info("drawing %d %s pictures", n, split)
        starts = list(range(0, n, CHUNK))
        sizes = [min(CHUNK, n - s) for s in starts]
        splits: list[world.Split] = [split] * len(starts)
        columns = (splits, [config.seed] * len(starts), starts, sizes)
        if config.workers > 1:
            with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
                parts = list(pool.map(draw_chunk, *columns))
        else:
            parts = list(map(draw_chunk, *columns))
        save_array(picture_path, np.concatenate([p for p, _ in parts]))
        save_array(code_path, np.concatenate([c for _, c in parts]))


def load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures [n, 64, 64, 3] uint8, memory mapped; codes [n, attributes] int64)."""
    picture_path, code_path = _paths(folder, split)
    return np.load(picture_path, mmap_mode="r"), np.load(code_path)
