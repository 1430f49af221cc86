"""The store and its queue: order means nothing, damage is named, a group has one owner."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from damage import rewrite
from safetensors.torch import save_file

from smidgen.difflora.zoo.queue import Queue, alive
from smidgen.difflora.zoo.records import pack_group, row_digest
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.tables import to_parquet
from smidgen.errors import BaseLockError, DataError

from .helpers import layout, numbers, record, zoo


def test_rows_come_back_by_name_whatever_order_they_were_written_in(tmp_path):
    one, other = zoo(tmp_path / "one"), zoo(tmp_path / "other", order=[2, 0, 1])
    assert one.digest() == other.digest()
    assert one.rows().ids == ["p00", "p01", "p10", "p11", "p20", "p21"]
    assert torch.equal(one.row("p11"), numbers(2, one.layout.size, seed=1)[1])
    assert torch.equal(torch.cat(list(one.rows().blocks(4))), one.rows().load().values)
    assert torch.equal(one.rows().take([5, 0]), one.rows().load().values[[5, 0]])
    assert one.verify() == 6


def test_splits_states_and_earlier_checkpoints(tmp_path):
    own = layout()
    made = Zoo.create(tmp_path, own)
    lines = [
        record("ann", step=5, last=False), record("ann"), record("bob", state="rejected", reason="odd"),
        record("cleo", split="test"),
    ]  # fmt: skip
    made.commit(pack_group(own, 0, numbers(4, own.size), lines))
    assert made.rows("train").ids == ["ann"]
    assert made.rows("train", last=False).ids == ["ann", "ann"]
    assert made.rows("train", state=None).ids == ["ann", "bob"]
    assert made.rows("test").ids == ["cleo"]
    assert torch.equal(made.row("ann"), numbers(4, own.size)[1])
    with pytest.raises(DataError, match=r"no adapters of test/rejected, but \['test/kept'"):
        made.rows("test", "rejected")
    with pytest.raises(DataError, match=r"No 'anna'.*Did you mean 'ann'"):
        made.row("anna")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_formats(tmp_path, dtype):
    own = replace(layout(), dtype=dtype)
    made = zoo(tmp_path, own=own)
    wanted = numbers(2, own.size, seed=1).to(getattr(torch, dtype)).float()
    assert torch.equal(made.read([line for line in made.records() if line.group == 1]), wanted)


def test_a_zoo_refuses_what_is_not_its_own(tmp_path):
    made = zoo(tmp_path)
    with pytest.raises(BaseLockError, match="another base"):
        Zoo.create(tmp_path, layout(seed=1))
    with pytest.raises(DataError, match="mixed ranks"):
        Zoo.create(tmp_path, layout(r=3))
    with pytest.raises(DataError, match="steps: None there, 7 now"):
        Zoo.create(tmp_path, layout(), {"steps": 7})
    made.commit(pack_group(layout(r=3), 3, numbers(1, layout(r=3).size), [record("odd")]))
    with pytest.raises(DataError, match=r"000003\.safetensors is of another layout"):
        made.row("odd")
    made.commit(pack_group(made.layout, 4, numbers(1, made.layout.size), [record("p00")]))
    with pytest.raises(DataError, match="'p00' after 10 steps is in groups 0 and 4"):
        made.records()
    with pytest.raises(DataError, match="is no zoo"):
        Zoo(tmp_path / "nowhere")


def test_damage_is_named(tmp_path):
    made = zoo(tmp_path)
    shard = made.shard_path(1)
    content = shard.read_bytes()
    rewrite(shard, content[:-40])
    with pytest.raises(DataError, match=r"000001.safetensors \([\d,]+ bytes\) is missing, half-written"):
        made.row("p10")
    assert made.row("p00") is not None, "other groups can be read"
    rewrite(shard, content[:-4] + b"\0\0\0\1")
    with pytest.raises(DataError, match=r"Row 1 \('p11'\).*not what was written"):
        made.row("p11")
    save_file({"rows": torch.zeros(2, made.layout.size), "more": torch.zeros(1)}, shard)
    with pytest.raises(DataError, match=r"holds \['more', 'rows'\]"):
        made.row("p10")
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        made.verify()
    rewrite(made.manifest_path(2), made.manifest_path(2).read_bytes()[:-10])
    with pytest.raises(DataError, match=r"000002\.parquet is damaged"):
        made.records()
    made.manifest_path(2).write_bytes(to_parquet([Other("x")]))
    with pytest.raises(DataError, match="columns"):
        made.records()
    described = json.loads((tmp_path / "zoo.json").read_text())
    (tmp_path / "zoo.json").write_text(json.dumps(described | {"setings": {}}))
    with pytest.raises(DataError, match="Did you mean 'settings'"):
        Zoo(tmp_path)


def test_a_group_is_there_when_its_manifest_is_and_half_written_files_are_swept(tmp_path):
    made = zoo(tmp_path, groups=1)
    files = pack_group(made.layout, 1, numbers(1, made.layout.size), [record("late")])
    made.shard_path(1).write_bytes(files.shard)  # killed between the two
    assert not made.has(1) and made.rows().ids == ["p00", "p01"]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    half = tmp_path / "shards" / f".000001.safetensors.{gone.pid}.tmp"
    mine = tmp_path / "shards" / f".000002.safetensors.{os.getpid()}.tmp"
    half.write_bytes(b"half")
    mine.write_bytes(b"being written")
    made.sweep()
    assert not half.exists() and mine.exists()
    made.commit(files)
    made.commit(pack_group(made.layout, 1, numbers(1, made.layout.size, seed=8), [record("late")]))
    assert torch.equal(made.row("late"), numbers(1, made.layout.size)[0]), "what is there stays"


def test_equal_rows_have_equal_digests():
    assert row_digest(torch.ones(3)) == row_digest(torch.ones(4)[:3])
    assert row_digest(torch.ones(3)) != row_digest(torch.ones(3) + 1e-7)


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_a_group_has_one_owner_at_a_time(tmp_path):
    queue, other = Queue(tmp_path), Queue(tmp_path)
    with queue.claim(0) as mine, other.claim(0) as theirs, other.claim(1) as another:
        assert (mine, theirs, another) == (True, False, True)
        assert queue.busy() == [0, 1]
    assert queue.busy() == [] and not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), queue.claim(0):
        raise RuntimeError("let go even so")
    with other.claim(0) as mine:
        assert mine


def test_the_dead_are_succeeded_and_the_distant_are_waited_for(tmp_path):
    queue = Queue(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not alive(gone.pid)
    with queue.claim(0):
        lock = next(tmp_path.glob("000000.0.json"))
        owner = json.loads(lock.read_text())
    (tmp_path / "000000.0.json").write_text(json.dumps(owner | {"pid": gone.pid}))
    (tmp_path / "000001.0.json").write_text(json.dumps(owner | {"started": owner["started"] - 100}))  # a pid used again
    (tmp_path / "000002.4.json").write_text(json.dumps(owner | {"host": "elsewhere"}))
    assert queue.busy() == [2]
    with queue.claim(0) as first, queue.claim(1) as second, queue.claim(2) as third:
        assert (first, second, third) == (True, True, False)
        assert (tmp_path / "000000.1.json").exists()
    long_ago = time.time() - 1000
    os.utime(tmp_path / "000002.4.json", (long_ago, long_ago))
    with queue.claim(2) as mine:
        assert mine
    assert not list(tmp_path.iterdir())


@dataclass
class Other:
    name: str
