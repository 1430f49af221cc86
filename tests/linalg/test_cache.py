"""The disk cache: hits, damage, eviction, several processes, and never a failure."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from damage import rewrite

from smidgen.adapters.linalg import cache
from smidgen.adapters.linalg.cache import cached, weight_key


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "deep" / "factors"))
    return tmp_path / "deep" / "factors"


class Counter:
    """A decomposition that counts its calls and never returns the same twice."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"u": torch.full((3, 2), float(self.calls)), "s": torch.arange(2.0)}


W = torch.arange(12.0).reshape(3, 4)


def test_second_time_is_read(folder):
    compute = Counter()
    first, second = cached(("svd", 2), W, compute), cached(("svd", 2), W.clone(), compute)
    assert compute.calls == 1
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert len(list(folder.iterdir())) == 1


def test_dtypes_layouts_and_empty_tensors_come_back(folder):
    want = {
        "half": torch.randn(3, 5).bfloat16().T,
        "index": torch.tensor([3, 1], dtype=torch.int64),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "view": torch.randn(6, 6)[1:3, ::2],
    }
    for _ in range(2):
        got = cached(("x",), W, lambda: want)
        assert all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)


@pytest.mark.parametrize(
    "other",
    [W + 1, W.reshape(4, 3), W.double(), W.bfloat16(), W.T.contiguous(), torch.nextafter(W, W + 1)],
    ids=["value", "shape", "dtype", "bf16", "transpose", "one ulp"],
)
def test_key_sees_the_weight(other):
    assert weight_key(("a",), other) != weight_key(("a",), W)


def test_key_sees_its_parts_and_the_version(monkeypatch):
    assert weight_key(("svd", 1, 23), W) != weight_key(("svd", 12, 3), W)
    assert weight_key(("a",), W) == weight_key(("a",), W.T.contiguous().T)  # same numbers, other strides
    before = weight_key(("a",), W)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert weight_key(("a",), W) != before


def truncate(path):
    rewrite(path, path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    rewrite(path, bytes(data))


def empty(path):
    rewrite(path, b"")


def noise(path):
    rewrite(path, os.urandom(500))


def huge_header(path):
    rewrite(path, (2**60).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("damage", [truncate, flip, empty, noise, huge_header])
def test_damage_is_recomputed_and_repaired(folder, damage):
    compute = Counter()
    cached(("a",), W, compute)
    damage(next(folder.iterdir()))
    assert cached(("a",), W, compute)["u"][0, 0] == 2
    assert cached(("a",), W, compute)["u"][0, 0] == 2 and compute.calls == 2


def test_a_hit_outlives_its_file(folder):
    """In a process of its own, which a mapping of the truncated file would kill with SIGBUS."""
    code = """if True:
        import torch
        from smidgen.adapters.linalg.cache import cache_folder, cached
        make = lambda: {"u": torch.ones(1000, 1000)}
        cached(("a",), torch.ones(2), make)
        found = cached(("a",), torch.ones(2), make)
        open(next(cache_folder().iterdir()), "wb").close()
        assert found["u"].sum() == 1000_000
    """
    environment = os.environ | {"PYTHONPATH": str(Path(cache.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


def test_off(folder, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", "off")
    compute = Counter()
    cached(("a",), W, compute)
    cached(("a",), W, compute)
    assert compute.calls == 2 and not folder.exists()


def test_default_folder(monkeypatch):
    monkeypatch.delenv("SMIDGEN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(cache.cache_folder()) == "/somewhere/.cache/smidgen/factors"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "file" / "inside"))
    compute = Counter()
    assert cached(("a",), W, compute)["u"][0, 0] == 1
    assert cached(("a",), W, compute)["u"][0, 0] == 2


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((cache, "save_file", full) if where == "save_file" else (cache.os, "replace", full)))
    assert cached(("a",), W, Counter())["u"][0, 0] == 1
    assert list(folder.iterdir()) == []


def test_a_time_stamp_that_cannot_be_renewed_is_still_a_hit(folder, monkeypatch):
    compute = Counter()
    cached(("a",), W, compute)

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(cache.os, "utime", refuse)
    cached(("a",), W, compute)
    assert compute.calls == 1


def test_least_recently_used_goes_first(folder):
    compute, weights = Counter(), [W + k for k in range(4)]
    for k, w in enumerate(weights[:3]):
        cached(("a",), w, compute)
        os.utime(folder / f"{weight_key(('a',), w)}.safetensors", (1000 + k, 1000 + k))
    size = next(folder.iterdir()).stat().st_size
    cached(("a",), weights[0], compute)  # used again: now the newest
    cached(("a",), weights[3], compute, limit=3 * size)
    left = {path.stem for path in folder.iterdir()}
    assert left == {weight_key(("a",), weights[k]) for k in (0, 2, 3)}
    cached(("a",), W + 9, compute, limit=0)
    assert list(folder.iterdir()) == []


def test_leftovers_of_crashed_writers_go(folder):
    folder.mkdir(parents=True)
    old, young = folder / "old.tmp", folder / "young.tmp"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    cached(("a",), W, Counter())
    assert not old.exists() and young.exists()


def worker(number):
    """Races with its siblings over the same 6 entries, under a bound that forces evictions all the time."""
    torch.set_num_threads(1)
    for turn in range(30):
        k = (turn * (number + 1)) % 6
        got = cached(("race",), W + k, lambda k=k: {"u": torch.full((50, 50), float(k))}, limit=35_000)
        if not torch.equal(got["u"], torch.full((50, 50), float(k))):
            return f"process {number} read a wrong entry {k}"
    return None


def test_several_processes(folder):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(worker, range(4)) == [None] * 4
    assert not list(folder.glob(".*.tmp"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 35_000
