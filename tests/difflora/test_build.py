"""Building a zoo: group training is one-by-one training; kills, workers and Ray change no byte; the gate and its reasons."""

import hashlib
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.bases.families import load_base
from smidgen.difflora.weightspace.layout import layout_of
from smidgen.difflora.zoo import build as build_module
from smidgen.difflora.zoo import group as group_module
from smidgen.difflora.zoo import store as store_module
from smidgen.difflora.zoo.build import build, job_of, open_zoo
from smidgen.difflora.zoo.gate import decide
from smidgen.difflora.zoo.group import build_group, trainer
from smidgen.difflora.zoo.settings import PRESETS, Gate, Group, Subjects, ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.status import status
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import hashed_split, make_subjects, read_pictures, read_subjects
from smidgen.difflora.zoo.tables import to_parquet
from smidgen.errors import BaseLockError, ConfigError, DataError, SmidgenError
from smidgen.tasks.personalize.settings import Adapter
from smidgen.training.fitting import fit
from smidgen.training.loop import LoopConfig
from smidgen.training.settings import flat, from_dict, to_dict


@pytest.fixture
def config(base, people, tmp_path) -> ZooConfig:
    return ZooConfig(
        subjects=Subjects(folder=people, held_out_share=0.3),
        adapter=Adapter(method="lora", rank=2, target_modules=("to_q", "to_v"), learning_rate=2e-2),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2),
        group=Group(group_size=2, train_batch_size=2),
        base=str(base),
        out=tmp_path / "zoo",
    )


@pytest.fixture(scope="session")
def few_people(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for name in ("ann", "bob", "cleo"):
        shutil.copytree(people / name, folder / name)
    return folder


def one_by_one(config: ZooConfig, folder: Path) -> tuple[torch.Tensor, list[list[float]]]:
    """Every adapter trained alone by ``personalize``'s own course: rows and loss curves, in the order of the table."""
    open_zoo(config)
    zoo, subjects = Zoo(config.out), read_subjects(config.out)
    rows, curves = [], []
    for person in job_of(replace(config, group=replace(config.group, group_size=99)), zoo, subjects, 0, False).people:
        group = trainer(config)
        task = group.task(person, group.encode(person))
        unet = load_base(config.base).model
        done = fit(
            person.id,
            unet,
            task,
            adapter_config(config),
            rates(config),
            config.train,
            folder / person.id,
            progress=False,
        )
        layout = layout_of(unet, unet.peft_config["default"])
        rows.append(layout.pack({k: la.slot("default").trained() for k, la in adapted_layers(unet).items()}).detach())
        curves.append(done.losses)
    return torch.stack(rows), curves


@pytest.mark.parametrize("method", ["lora", "svfit", pytest.param("tlora", marks=pytest.mark.slow)])
def test_group_training_is_training_one_by_one(config, few_people, tmp_path, monkeypatch, method):
    """The same loss curves and the same numbers, with gradients long enough to be cut."""
    adapter = replace(config.adapter, method=method, rank=None if method == "tlora" else 2, learning_rate=None)
    train = replace(config.train, max_train_steps=6, checkpointing_steps=6, max_grad_norm=0.01)
    few = replace(config.subjects, folder=few_people)
    config = replace(config, subjects=few, adapter=adapter, train=train, group=Group(group_size=3, train_batch_size=1))
    wanted, curves = one_by_one(config, tmp_path / "alone")
    tasks = []
    task_class = group_module.GroupTask
    monkeypatch.setattr(group_module, "GroupTask", lambda people: tasks.append(task_class(people)) or tasks[-1])
    build(config, progress=False)
    found = torch.stack([Zoo(config.out).row(person.id) for person in read_subjects(config.out)])
    together = torch.stack(tasks[0].history)  # [step, person]
    torch.testing.assert_close(together.T, torch.tensor(curves), rtol=1e-4, atol=1e-5)
    moved = (wanted - wanted.mean(0)).norm()
    assert float((found - wanted).norm() / moved) < 0.02
    assert float((together[0] - together[-1]).abs().max()) > 1e-4, "something was learnt"


@pytest.mark.parametrize("method", ["seeded", "rotation+low_rank"])
def test_a_zoo_takes_any_method_at_its_own_rate(config, few_people, method):
    adapter = replace(config.adapter, method=method, rank=2, learning_rate=None)
    few = replace(config.subjects, folder=few_people)
    build(replace(config, subjects=few, adapter=adapter, group=Group(group_size=3, train_batch_size=1)), progress=False)
    rows = torch.stack([Zoo(config.out).row(person.id) for person in read_subjects(config.out)])
    assert rows.isfinite().all() and all(not torch.equal(rows[0], other) for other in rows[1:])


def test_clipping_and_divergence_stay_with_their_adapter():
    from smidgen.difflora.zoo.task import GroupTask

    task = GroupTask.__new__(GroupTask)
    weights = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(3, 2, 2))]
    weights[0].grad = torch.tensor([[3.0, 0.0], [0.1, 0.0], [float("nan"), 1.0]])
    weights[1].grad = torch.stack([torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.ones(2, 2)])
    norm = task.clip_gradients(weights, 1.0)
    assert float(norm) == pytest.approx(5.0)
    assert weights[0].grad[0].tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert float(weights[1].grad[0, 0, 0]) == pytest.approx(0.8, abs=1e-5)
    assert weights[0].grad[1].tolist() == pytest.approx([0.1, 0.0]), "short gradients stay"
    assert not weights[0].grad[2].any() and not weights[1].grad[2].any(), "a broken one is dropped, alone"


def test_common_random_numbers_and_start_can_be_switched_off(config):
    def rows(**changes) -> torch.Tensor:
        own = replace(
            config,
            group=replace(config.group, **changes),
            out=config.out.with_name(str(len(changes)) + str(changes)[:20]),
        )
        own = replace(
            own,
            train=replace(own.train, max_train_steps=1, lr_warmup_steps=0),
            adapter=replace(own.adapter, learning_rate=1e-9),
        )
        build(own, progress=False)
        return Zoo(own.out).rows(state=None).load().values

    shared = rows()
    assert float((shared - shared[0]).abs().max()) < 1e-6, "everybody starts from the same numbers"
    apart = rows(shared_start=False)
    assert float((apart - apart[0]).abs().max()) > 0.01
    group = trainer(config)
    zoo = open_zoo(config)
    members = job_of(config, zoo, read_subjects(config.out), 0, False).people
    common = [group.task(p, group.encode(p)).batch(3) for p in members]
    assert torch.equal(common[0]["noise"], common[1]["noise"]) and torch.equal(common[0]["levels"], common[1]["levels"])
    group.config = replace(config, group=replace(config.group, common_noise=False))
    apart = [group.task(p, group.encode(p)).batch(3) for p in members]
    group.config = config
    assert not torch.equal(apart[0]["noise"], apart[1]["noise"])


def test_a_frozen_start_cannot_differ(config):
    adapter = Adapter(method="tlora", transform_rank=2, target_modules=("to_q",))
    own = replace(config, adapter=adapter, group=Group(group_size=2, shared_start=False))
    with pytest.raises(ConfigError, match="shared_start=False has no meaning"):
        build(own, progress=False)


# ---- the same bytes, whatever happens --------------------------------------------------------------------------------


def test_order_changes_no_byte(config):
    build(config, progress=False)
    again = replace(config, out=config.out.with_name("backwards"))
    zoo, subjects = open_zoo(again), read_subjects(again.out)
    for number in (2, 0, 1):
        zoo.commit(build_group(job_of(again, zoo, subjects, number, keep_work=False)))
    assert zoo.digest() == Zoo(config.out).digest()


def forked(run) -> int:
    """Runs in a child process; returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except SmidgenError as error:
            print(error, file=sys.stderr)
            os._exit(3)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_two_workers_share_the_queue(config):
    build(config, progress=False)
    again = replace(config, out=config.out.with_name("workers"))
    open_zoo(again)
    other = os.fork()
    if other == 0:
        os._exit(0 if build_module._worker(again, os.getppid()) is None else 1)
    build(again, progress=False)
    assert os.waitpid(other, 0)[1] == 0
    assert Zoo(again.out).digest() == Zoo(config.out).digest()
    assert status(again.out).done == 5 and status(again.out).working == 0
    assert build_module._worker(again, parent=-1) is None, "an orphan takes nothing"


def dies(real, after: int, half: bool = False):
    """``real``, until its call number ``after``: then SIGKILL, with a half-written file if told so."""
    count = [0]

    def run(*values, **named):
        count[0] += 1
        if count[0] == after:
            if half:
                hidden = values[0].with_name(f".{values[0].name}.{os.getpid()}.tmp")
                hidden.parent.mkdir(parents=True, exist_ok=True)
                hidden.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values, **named)

    return run


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_killed_build_goes_on_to_the_same_bytes(config, monkeypatch):
    build(config, progress=False)
    wanted = Zoo(config.out).digest()
    victim = replace(config, out=config.out.with_name("killed"))
    open_zoo(victim)
    loss, write = group_module.GroupTask.loss, store_module.replace_file
    with monkeypatch.context() as patch:  # in the first group, after its checkpoint
        patch.setattr(group_module.GroupTask, "loss", dies(loss, 4))
        assert forked(lambda: build(victim, progress=False)) == -signal.SIGKILL
    assert (victim.out / "work" / "000000" / "checkpoint-2").is_dir()
    with monkeypatch.context() as patch:  # between a shard and its manifest
        patch.setattr(store_module, "replace_file", dies(write, 3, half=True))
        assert forked(lambda: build(victim, progress=False)) == -signal.SIGKILL
    assert list((victim.out / "manifest").glob(".*.tmp")) and list((victim.out / "locks").iterdir())
    found = build(victim, progress=False)
    assert Zoo(victim.out).digest() == wanted
    assert found.done == 5 and len(Zoo(victim.out).records()) == 5
    assert not list(victim.out.rglob("*.tmp")) and not list((victim.out / "locks").iterdir())
    assert not list((victim.out / "work").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_an_interrupted_build_says_how_to_go_on(config, monkeypatch, capfd):
    open_zoo(config)
    real = group_module.GroupTask.loss
    with monkeypatch.context() as patch:
        patch.setattr(
            group_module.GroupTask, "loss", lambda *values: (os.kill(os.getpid(), signal.SIGTERM), real(*values))[1]
        )
        assert forked(lambda: build(config, progress=False)) == 3
    said = capfd.readouterr().err
    assert "Stopped with 0 of 3 groups" in said and "the same command goes on" in said
    assert build(config, progress=False).missing == 0


@pytest.mark.slow
def test_spawned_workers_change_no_byte(config):
    build(config, progress=False)
    again = replace(config, out=config.out.with_name("workers"))
    found = build(again, workers=2, progress=False)
    assert Zoo(again.out).digest() == Zoo(config.out).digest()
    assert found.done == 5 and found.missing == 0
    again = replace(config, out=config.out.with_name("failing"))
    open_zoo(again)
    victim = read_subjects(again.out)[4]
    (again.out / "subjects.parquet").write_bytes(to_parquet([replace(victim, digests=("0" * 64,) * 3)]))
    with pytest.raises(SmidgenError, match="workers failed: DataError: The picture"):
        build(again, workers=2, progress=False)


@pytest.mark.slow
def test_ray_runs_the_same_path(config, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    build(config, progress=False)
    again = replace(config, out=config.out.with_name("ray"))
    build(again, ray="local", progress=False)
    assert Zoo(again.out).digest() == Zoo(config.out).digest()


@pytest.mark.slow
def test_the_last_checkpoints_go_in_too(config):
    own = replace(config, group=replace(config.group, keep_last=2, keep_every=1))
    build(own, progress=False)
    zoo = Zoo(own.out)
    lines = zoo.rows(state=None, last=False).lines
    assert [(line.step, line.last) for line in lines if line.id == "ann"] == [(3, False), (4, True)]
    pair = zoo.read([line for line in lines if line.id == "ann"])
    assert 0 < float((pair[0] - pair[1]).norm()) < float(pair[1].norm())
    plain = replace(config, out=config.out.with_name("plain"))
    build(plain, progress=False)
    assert torch.equal(Zoo(plain.out).row("ann"), pair[1]), "the last one is that of a build without"


# ---- people, settings, the gate ----------------------------------------------------------------------------------------


def test_people_come_from_a_folder_and_stay_on_their_side(config, people):
    found = make_subjects(config.out, config.subjects)
    assert [person.id for person in found] == ["ann", "bob", "cleo", "dan", "eve"]
    assert found == read_subjects(config.out)
    assert {p.split for p in found} == {"train", "test"}
    assert all(person.split == hashed_split(person.id, 0.3) for person in found)
    content = read_pictures(config.out, found[0])
    assert hashlib.sha256(content[0]).hexdigest() == found[0].digests[0]


def test_invented_people_are_distinct_and_split_by_identity(tmp_path):
    pytest.importorskip("dicebear")
    found = make_subjects(tmp_path, Subjects(people=6, held_out=3, pictures=2))
    faces = {tuple(sorted(p.attributes.items())): p.split for p in found}
    assert len(faces) == 9 and list(faces.values()).count("test") == 3
    assert found[0].captions == found[1].captions, "everybody in the same scenes"
    apart = make_subjects(tmp_path / "apart", Subjects(people=2, held_out=0, pictures=2, same_scenes=False))
    assert apart[0].captions != apart[1].captions
    with pytest.raises(DataError, match="991 people for 'test'"):
        make_subjects(tmp_path / "many", Subjects(people=1, held_out=992))


def test_bad_people_are_refused(config, people, tmp_path):
    def refuse(folder: Path, match: str, **changes) -> None:
        with pytest.raises(DataError, match=match):
            make_subjects(config.out, replace(config.subjects, folder=folder, **changes))

    refuse(tmp_path / "nowhere", "is no folder")
    twice = tmp_path / "twice"
    shutil.copytree(people / "ann", twice / "ann")
    shutil.copytree(people / "ann", twice / "anna")
    refuse(twice, "one person under two names")
    shutil.rmtree(twice / "anna")
    refuse(people, "All 5 people are held out", held_out_share=0.999999)
    (twice / "ann" / "0.png").write_bytes(b"no picture")
    refuse(twice, "cannot be read")
    build_from = make_subjects(config.out, config.subjects)
    moved = replace(build_from[0], digests=("0" * 64, *build_from[0].digests[1:]))
    with pytest.raises(DataError, match="has changed since"):
        read_pictures(config.out, moved)


def test_a_zoo_is_gone_on_with_by_its_own_settings_only(config, sdlike):
    build(config, progress=False)
    with pytest.raises(DataError, match=r"settings \(train.max_train_steps: 4 there, 5 now\)"):
        build(replace(config, train=replace(config.train, max_train_steps=5)), progress=False)
    with pytest.raises(BaseLockError, match="another base"):
        build(replace(config, base=str(sdlike)), progress=False)
    with pytest.raises(ConfigError, match="workers"):
        build(config, workers=0)


@pytest.fixture(scope="session")
def sdlike(tmp_path_factory, base) -> Path:
    """The same architecture with other weights."""
    folder = tmp_path_factory.mktemp("other") / "sd"
    shutil.copytree(base, folder)
    from safetensors.torch import load_file, save_file

    path = next((folder / "unet").glob("*.safetensors"))
    save_file({k: v + 0.1 * torch.ones_like(v) for k, v in load_file(path).items()}, path)
    return folder


def test_every_setting_is_a_flag_of_its_own():
    """The command line leaves the sections' names out."""
    leaves = [name.rpartition(".")[2] for name in flat(ZooConfig())]
    assert sorted(leaves) == sorted(set(leaves))
    assert from_dict(ZooConfig, to_dict(PRESETS["debug"])) == PRESETS["debug"]
    for wrong in (lambda: Group(group_size=0), lambda: Gate(inference_steps=0), lambda: Subjects(people=0)):
        with pytest.raises(ConfigError):
            wrong()


def test_the_gate_says_why():
    gate = Gate(margin=0.1)
    assert decide(gate, 0.1, 0.2, (0.5, 0.0)).state == "kept"
    assert decide(gate, 0.1, 0.2, None).state == "kept"
    assert "diverged" in decide(gate, float("nan"), 0.2, (0.5, 0.0)).reason
    assert "not below the base's 0.2000" in decide(gate, 0.3, 0.2, (0.5, 0.0)).reason
    assert "identity score 0.050 is not 0.1 above the base's 0.000" in decide(gate, 0.1, 0.2, (0.05, 0.0)).reason
    assert decide(gate, 0.1, 0.2, (float("nan"), 0.0)).state == "rejected"


def test_rejects_are_kept_with_their_reason(config):
    own = replace(config, adapter=replace(config.adapter, learning_rate=30.0, target_modules=("conv_out",)))
    found = build(own, progress=False)
    assert found.kept == 0 and found.done == 5
    assert all("loss" in reason for reason in found.rejected.values())
    assert "5 rejected" in str(found) and "ann" in str(found)
    assert torch.isfinite(Zoo(own.out).row("ann")).all()
    with pytest.raises(DataError, match="no adapters of train/kept"):
        Zoo(own.out).rows("train")
