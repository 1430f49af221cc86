"""A folder of adapters while it changes: eviction, reload, deletion in flight, damage, threads, a worker that dies."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from serving.helpers import CHAT, METHODS, TEXT, classifier, copied
from smidgen.errors import AdapterFileError, BaseLockError, ConfigError
from smidgen.serving import shelf
from smidgen.serving.library import Library
from smidgen.serving.requests import (
    BusyError,
    ClosedError,
    FailedError,
    ReplacedError,
    TextPiece,
    TextRequest,
    UnknownAdapterError,
)

PROMPT = "what is 3 plus 4 ?"


def said(library: Library, model: str, tokens: int = 12) -> tuple[int, ...]:
    return library.generate(TextRequest(model, PROMPT, tokens)).result(60).token_ids


def test_names_infos_and_what_is_no_name(chats: Path) -> None:
    with Library(chats, bases=[CHAT]) as library:
        infos = {info.name: info for info in library.adapters()}
        assert list(infos) == sorted([*METHODS, "team/ann"])
        assert infos["svfit"].parameters == 16 and infos["svfit"].bytes == 64
        assert {(info.method, info.base, info.task) for info in infos.values()} >= {("svfit", CHAT, "instruction")}
        assert len({info.fingerprint for info in infos.values()}) == len(infos)
        (base,) = library.bases()
        assert (base.name, base.verbs, base.loaded) == (CHAT, ("generate", "embed"), True)
        for name in ("svfi", "team", "../chats/svfit", "", "team/ann/x", ".svfit", "/etc"):
            with pytest.raises(UnknownAdapterError, match="no adapter and no base"):
                library.generate(TextRequest(name, PROMPT))
        with pytest.raises(UnknownAdapterError, match="Did you mean 'svfit'"):
            library.info("svfti")
        with pytest.raises(ConfigError, match="is a base, which has no weight"):
            library.generate(TextRequest({"svfit": 1.0, CHAT: 0.5}, PROMPT))
        with pytest.raises(ConfigError, match="strength"):
            library.generate(TextRequest({"svfit": 1e9}, PROMPT))


def test_the_least_recently_used_leave_first(chats: Path) -> None:
    with Library(chats, bases=[CHAT], budget_bytes=8200) as library:  # oft has 7,936 bytes, svfit, loldu and seeded 64
        expected = {name: said(library, name) for name in ("svfit", "loldu", "seeded")}
        assert library.info("svfit").resident and library.counters().evictions == 0
        said(library, "svfit")
        said(library, "oft")
        assert library.counters().evictions == 0
        said(library, "team/ann")
        said(library, "tlora")  # 1,792 bytes: loldu, seeded, svfit and oft go, in this order
        state = {info.name: info.resident for info in library.adapters()}
        assert state == {**dict.fromkeys(METHODS, False), "tlora": True, "team/ann": True}
        assert library.counters().resident_bytes <= 8200
        assert {name: said(library, name) for name in expected} == expected
        with pytest.raises(AdapterFileError, match="more than the"):
            Library(chats, budget_bytes=300).info("oft")


def test_what_is_pinned_stays_and_what_is_in_use_is_waited_for(chats: Path) -> None:
    with Library(chats, bases=[CHAT], budget_bytes=4000) as library:
        assert library.pin("lora").pinned  # 3,584 bytes
        with pytest.raises(BusyError, match="pinned or in use"):
            said(library, "tlora")
        assert library.info("lora").resident
        library.unpin("lora")
        said(library, "tlora")
        assert not library.info("lora").resident
        long = library.generate(TextRequest("tlora", PROMPT, 100))  # in use: lora waits for its end, and is not refused
        short = library.generate(TextRequest("lora", PROMPT, 3))
        assert short.result(60).completion_tokens == 3 and long.result(60).completion_tokens > 20
        assert library.unload("lora") and not library.unload("lora")


def test_a_replaced_adapter_is_read_again_and_who_began_ends_with_the_old(tmp_path: Path, chats: Path) -> None:
    copied(chats / "svfit", tmp_path / "ann")
    with Library(tmp_path, bases=[CHAT]) as library:
        first, before = library.info("ann"), said(library, "ann", 100)
        running = library.generate(TextRequest("ann", PROMPT, 100))
        next(iter(running))
        library.add("ann", chats / "loldu", overwrite=True)
        now = library.generate(TextRequest("ann", PROMPT, 100))
        assert not running.done
        assert running.result(60).token_ids == before and now.result(60).token_ids != before
        assert running.adapters[0].fingerprint == first.fingerprint != now.adapters[0].fingerprint
        assert now.adapters[0].fingerprint == library.info("ann").fingerprint
        assert library.counters().resident == 1  # the old version has left


def test_no_adapter_lies_inside_another(tmp_path: Path, chats: Path) -> None:
    with Library(tmp_path / "shelf", bases=[CHAT]) as library:
        for first, second in (("one", "one/sub"), ("team/bob", "team"), ("a/b/c", "a/b"), ("d", "d/e/f")):
            library.add(first, chats / "lora")
            with pytest.raises(ConfigError, match=f"The name '{second}' goes with no '{first}'"):
                library.add(second, chats / "svfit")
            assert library.info(first).name == first
            library.remove(first)
            library.add(second, chats / "svfit")
            library.remove(second)
        library.add("team/bob", chats / "lora")
        library.add("team/ann", chats / "lora")
        assert sorted(one.name for one in library.adapters()) == ["team/ann", "team/bob"]


def test_an_adapter_that_is_deleted_while_it_is_read_is_unknown(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shelf.Shelf(copied(chats / "svfit", tmp_path / "ann").parent, 2**20)

    def read(name: str, folder: Path, most: int) -> shelf.Entry:
        shutil.rmtree(folder)
        return whole(name, folder, most)

    whole = shelf.read
    monkeypatch.setattr(shelf, "read", read)
    with pytest.raises(UnknownAdapterError):
        found.entry("ann")


def test_a_deleted_adapter_is_unknown_and_who_began_ends_with_it(tmp_path: Path, chats: Path) -> None:
    copied(chats / "svfit", tmp_path / "team" / "ann")
    with Library(tmp_path, bases=[CHAT]) as library:
        expected = said(library, "team/ann", 100)
        running = library.generate(TextRequest("team/ann", PROMPT, 100))
        next(iter(running))
        library.remove("team/ann")
        assert not running.done and not (tmp_path / "team").exists()
        with pytest.raises(UnknownAdapterError):
            library.generate(TextRequest("team/ann", PROMPT))
        assert running.result(60).token_ids == expected
        assert library.counters().resident == 0
        with pytest.raises(UnknownAdapterError):
            library.remove("team/ann")


def test_who_waits_for_a_version_that_is_gone_gets_an_error_and_never_another(tmp_path: Path, chats: Path) -> None:
    copied(chats / "lora", tmp_path / "ann")
    copied(chats / "svfit", tmp_path / "bob")
    with Library(tmp_path, bases=[CHAT], batch=1) as library:
        first = library.generate(TextRequest("bob", PROMPT, 100))
        waits = library.generate(TextRequest("ann", PROMPT, 5))
        shutil.rmtree(tmp_path / "ann")
        copied(chats / "loldu", tmp_path / "ann")
        with pytest.raises(ReplacedError, match="make it again"):
            waits.result(60)
        assert first.result(60).token_ids == said(library, "bob", 100) and said(library, "ann")


def test_refresh_drops_what_is_gone_and_reads_pinned_ones_again(tmp_path: Path, chats: Path) -> None:
    copied(chats / "svfit", tmp_path / "ann")
    copied(chats / "lora", tmp_path / "bob")
    with Library(tmp_path, bases=[CHAT]) as library:
        old = library.pin("ann").fingerprint
        library.load("bob")
        shutil.rmtree(tmp_path / "bob")
        shutil.rmtree(tmp_path / "ann")
        copied(chats / "loldu", tmp_path / "ann")
        library.refresh()
        info = library.info("ann")
        assert info.resident and info.pinned and info.fingerprint != old
        assert library.counters().resident == 1


def test_what_is_damaged_hostile_or_of_another_base_is_refused(tmp_path: Path, chats: Path) -> None:
    root = tmp_path / "root"
    with Library(root, bases=[CHAT]) as library:
        bad = copied(chats / "svfit", tmp_path / "bad")
        weights = bad / "adapter_model.safetensors"
        raw = weights.read_bytes()
        weights.write_bytes(raw[:-4])
        with pytest.raises(AdapterFileError, match="truncated"):
            library.add("bad", bad)
        save_file({name: value + 1 for name, value in load_file(chats / "svfit" / weights.name).items()}, weights)
        with pytest.raises(AdapterFileError):  # the checksum
            library.add("bad", bad)
        weights.unlink()
        weights.with_suffix(".bin").write_bytes(b"pickle")
        with pytest.raises(AdapterFileError, match=r"no adapter_model.safetensors"):
            library.add("bad", bad)
        with pytest.raises(BaseLockError):
            library.add("other", _of_another_base(tmp_path))
        with pytest.raises(ConfigError, match="those served are: debug-chat"):
            library.add("mood", classifier(tmp_path / "mood", base=TEXT))
        for name in ("../out", "a/b/c/d", ".hidden", "a b", "", "x" * 200, CHAT):
            with pytest.raises(ConfigError, match="name"):
                library.add(name, chats / "svfit")
        assert list(root.iterdir()) == [] and library.adapters() == [] and library.counters().resident == 0
        library.add("ann", chats / "svfit")
        with pytest.raises(ConfigError, match="already"):
            library.add("ann", chats / "svfit")
        shutil.copytree(bad, root / "bad")
        assert list(library.refused()) == ["bad"] and [info.name for info in library.adapters()] == ["ann"]
        with pytest.raises(AdapterFileError):
            library.generate(TextRequest("bad", PROMPT))
        os.symlink("/etc", root / "link")
        with pytest.raises(UnknownAdapterError):
            library.info("link")


def _of_another_base(folder: Path) -> Path:
    """An adapter whose lock is of other weights than the base's."""
    import torch

    import smidgen
    from serving.helpers import LAYERS, config
    from smidgen import testing
    from smidgen.bases.transformers import load_language_model

    model = load_language_model(CHAT, "no", None).model
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    smidgen.adapt(model, config("svfit", LAYERS[CHAT], task_type="CAUSAL_LM"))
    testing.perturb(model, 0)
    return smidgen.save(model, folder / "another")


def test_an_adapter_that_does_nothing_is_refused_as_off(tmp_path: Path) -> None:
    import smidgen
    from serving.helpers import LAYERS, config
    from smidgen import testing
    from smidgen.bases.transformers import load_language_model

    model = load_language_model(CHAT, "no", None).model
    smidgen.adapt(model, config("svfit", LAYERS[CHAT], task_type="CAUSAL_LM"))
    smidgen.save(model, tmp_path / "idle")
    testing.perturb(model, 0)
    smidgen.save(model, tmp_path / "good")
    with Library(tmp_path / "root", bases=[CHAT]) as library:
        for first_of_its_config in (True, False):
            with pytest.raises(AdapterFileError, match="is OFF"):
                library.add("idle", tmp_path / "idle")
            assert [info.name for info in library.adapters()] == ([] if first_of_its_config else ["good"])
            if first_of_its_config:
                library.add("good", tmp_path / "good")
        assert library.generate(TextRequest(CHAT, PROMPT, 3)).result(60).completion_tokens == 3


def test_a_cache_of_the_hub_is_a_library(tmp_path: Path, chats: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    copied(chats / "svfit", tmp_path / "models--ann--mood" / "snapshots" / commit)
    refs = tmp_path / "models--ann--mood" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    with Library(tmp_path) as library:
        assert [info.name for info in library.adapters()] == ["ann/mood"]
        assert [base.name for base in library.bases()] == [CHAT]  # the one that it names
        assert said(library, "ann/mood")
        with pytest.raises(ConfigError, match="cache of the Hub"):
            library.remove("ann/mood")


def test_many_threads_ask_at_once(chats: Path) -> None:
    names = [*METHODS, "team/ann", CHAT]
    with Library(chats, bases=[CHAT], batch=5) as library:
        expected = {name: said(library, name, 8) for name in names}
        wrong: list[object] = []

        def ask(first: int) -> None:
            for turn in range(6):
                name = names[(first + turn) % len(names)]
                try:
                    if said(library, name, 8) != expected[name]:
                        wrong.append(name)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert wrong == []
        counters = library.counters()
        assert counters.active == counters.queued == 0 and counters.requests == {"generate": 8 + 48}


def test_a_full_queue_says_so_and_lists_wait_for_room(chats: Path) -> None:
    with Library(chats, bases=[CHAT], batch=2, queue=3) as library:
        long = [library.generate(TextRequest("svfit", PROMPT, 110)) for _ in range(2)]
        while library.counters().active < 2:
            time.sleep(0.001)
        more = [library.generate(TextRequest("lora", PROMPT, 2)) for _ in range(3)]
        with pytest.raises(BusyError, match="3 requests wait"):
            library.generate(TextRequest("lora", PROMPT, 2))
        assert all(handle.result(60).token_ids for handle in [*long, *more])
        assert len(library.generate_all([TextRequest("lora", PROMPT, 2)] * 20)) == 20


def test_a_worker_that_dies_ends_its_requests_in_an_error_and_another_goes_on(chats: Path) -> None:
    with Library(chats, bases=[CHAT], batch=1) as library:
        expected = said(library, "svfit")
        running, waiting = (library.generate(TextRequest("svfit", PROMPT, 110)) for _ in range(2))
        next(iter(running))
        library._host(CHAT, "generate", ())._kill()
        for handle in (running, waiting):
            with pytest.raises(ClosedError, match="stopped"):
                handle.result(60)
        assert library.alive and said(library, "svfit") == expected


def test_a_worker_that_dies_while_it_takes_requests_leaves_none_hanging(
    chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(entry: object) -> None:
        raise SystemExit

    with Library(chats, bases=[CHAT]) as library:
        host = library._host(CHAT, "generate", ())
        running = library.generate(TextRequest("svfit", PROMPT, 50))
        next(iter(running))
        monkeypatch.setattr(host, "_hold", dies)
        handles = [library.generate(TextRequest(name, PROMPT, 5)) for name in ("lora", "tlora", "oft")]
        for handle in (running, *handles):
            with pytest.raises(ClosedError, match="stopped"):
                handle.result(60)
        monkeypatch.undo()
        assert said(library, "lora")


def test_a_step_that_fails_ends_its_requests_and_no_others(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Library(chats, bases=[CHAT]) as library:
        expected = said(library, "svfit")
        batch = library._host(CHAT, "generate", ()).batches["generate"]
        good = batch._forward  # type: ignore[attr-defined]
        monkeypatch.setattr(batch, "_forward", lambda *given: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(FailedError, match="RuntimeError: out of memory"):
            said(library, "svfit")
        monkeypatch.setattr(batch, "_forward", good)
        assert said(library, "svfit") == expected and library.counters().active == 0


def test_a_listener_that_fails_hurts_nobody(chats: Path) -> None:
    with Library(chats, bases=[CHAT]) as library:
        expected, heard = said(library, "svfit", 50), threading.Event()
        handle = library.generate(TextRequest("svfit", PROMPT, 50))

        def listen() -> None:
            heard.set()
            raise RuntimeError("Event loop is closed")

        next(iter(handle))
        with pytest.raises(RuntimeError):  # called at once, in the thread that asks
            handle.on_change(listen)
        heard.clear()
        assert handle.result(60).token_ids == expected and heard.is_set()


def test_a_base_that_is_not_there_is_said_at_once(chats: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-base"):
        Library(chats, bases=[CHAT, "no-such-base"])


def test_closing_waits_for_answers_or_ends_them(chats: Path) -> None:
    library = Library(chats, bases=[CHAT])
    running = library.generate(TextRequest("svfit", PROMPT, 40))
    library.close()
    assert running.result(0).completion_tokens == 40
    with pytest.raises(ClosedError):
        library.generate(TextRequest("svfit", PROMPT, 4))
    library = Library(chats, bases=[CHAT])
    running = library.generate(TextRequest("svfit", PROMPT, 118))
    assert isinstance(next(iter(running)), TextPiece)
    library.close(0.0)
    with pytest.raises(ClosedError):
        running.result(10)


def test_adapters_for_something_else_are_refused_in_words(chats: Path, moods: Path, tmp_path: Path) -> None:
    copied(chats / "svfit", tmp_path / "talks")
    copied(moods / "two", tmp_path / "sorts")
    with Library(tmp_path) as library:
        with pytest.raises(ConfigError, match="ask it to classify or embed, not to generate"):
            library.generate(TextRequest("sorts", PROMPT))
        with pytest.raises(ConfigError, match="adapters of one base add up"):
            library.generate(TextRequest({"talks": 1.0, "sorts": 1.0}, PROMPT))
        with pytest.raises(ConfigError, match="cannot generate"):
            library.generate(TextRequest(TEXT, PROMPT))
