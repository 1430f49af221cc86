"""Adapters add: the sum of files does what the adapters do together, or there is a sentence why not."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.methods import SIDES
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import SmidgenError

WEIGHTS = [0.3, -1.2, 0.5]
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def trained(folder, method, noise=1, base=None, **options):
    """A saved adapter with random numbers, and its updates by layer."""
    if isinstance(method, str):
        options = {"target_modules": ["up", "down"], "store_dtype": "float32"} | options
    model = smidgen.adapt(Net() if base is None else base, method, **options)
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "smidgen" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    smidgen.save(model, folder)
    return folder, deltas(model)


def deltas(model):
    return {n: layer.delta_matrix("default").detach() for n, layer in adapted_layers(model).items()}


EXACT = [
    ("svfit", {"r": 6}),
    ("svfit", {"r": 64, "alpha": 8, "relative": True}),
    ("loldu", {"r": 6}),
    ("loldu", {"r": 5, "atoms": "raw", "alpha": 2}),
    ("seeded", {"r": 30}),
    ("lora", {"r": 2}),
    ("lora", {"r": 3, "alpha": 6, "scaling": "rslora", "rank_pattern": {"down": 1}}),
    ("diagonal", {}),
    ("diagonal+spectral", {"r": 4}),
    ("diagonal+low_rank", {"r": 2, "alpha": 8}),
]


@pytest.mark.parametrize("method, options", EXACT)
def test_the_sum_of_files_is_the_sum_of_updates(method, options, tmp_path):
    made = [trained(tmp_path / str(seed), method, seed, **options) for seed in range(3)]
    smidgen.combine([folder for folder, _ in made], WEIGHTS, out=tmp_path / "sum")
    model = smidgen.load(Net(), tmp_path / "sum")
    for target, delta in deltas(model).items():
        wanted = sum(w * d[target] for w, (_, d) in zip(WEIGHTS, made, strict=True))
        testing.close(delta, wanted, target)
    report = smidgen.verify(model, tmp_path / "sum")
    assert report.ok and report.canary_error < 1e-4 and report.sealed, report
    beside = Net()
    for k, (folder, _) in enumerate(made):
        smidgen.load(beside, folder, str(k))
    smidgen.set_active(beside, ["0", "1", "2"])
    smidgen.set_strength(beside, {str(k): w for k, w in enumerate(WEIGHTS)})
    torch.testing.assert_close(model(X), beside(X), rtol=1e-4, atol=1e-4)


MEMBERS = [(side, name) for side, members in SIDES.items() for name in members]


@pytest.mark.parametrize("side, name", MEMBERS)
def test_every_member_adds_exactly_or_says_why_not(side, name, tmp_path):
    config = smidgen.config(**{side: name}, target_modules=["up", "down"])
    made = [trained(tmp_path / str(k), replace(config), k) for k in range(2)]
    folders = [folder for folder, _ in made]
    if not (SIDES[side][name].linear or name == "low_rank"):
        with pytest.raises(SmidgenError, match=r"do not add: .* not linear"):
            smidgen.combine(folders, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    found = deltas(smidgen.load(Net(), smidgen.combine(folders, [2, -1], out=tmp_path / "out")))
    for target, delta in found.items():
        testing.close(delta, 2 * made[0][1][target] - made[1][1][target], target)


def test_an_output_transform_beside_others_does_not_add(tmp_path):
    folders = [trained(tmp_path / name, "dora", seed, r=2)[0] for name, seed in (("a", 1), ("b", 2))]
    with pytest.raises(
        SmidgenError, match=r"dora r=2 do not add: the magnitude output transform .* acts on what others make"
    ):
        smidgen.combine(folders, out=tmp_path / "out")
    with pytest.raises(SmidgenError, match=r"dora r=2, whose numbers have no rank to change"):
        smidgen.resize(folders[0], out=tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_loras_average_of_factors_is_another_adapter(tmp_path):
    (a, da), (b, db) = (trained(tmp_path / name, "lora", seed, r=2) for name, seed in (("a", 1), ("b", 2)))
    model, other = smidgen.load(Net(), a), smidgen.load(Net(), b)
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    wanted = (da["up"] + db["up"]) / 2
    assert float((deltas(model)["up"] - wanted).norm() / wanted.norm()) > 0.3
    exact = deltas(smidgen.load(Net(), smidgen.combine([a, b], out=tmp_path / "sum")))["up"]
    testing.close(exact, wanted, "ranks side by side")
    (c, dc) = trained(tmp_path / "c", "lora", 3, r=5, alpha=10)
    both = deltas(smidgen.load(Net(), smidgen.combine([a, c], [1, 1], out=tmp_path / "two")))["up"]
    testing.close(both, da["up"] + dc["up"], "of two ranks and alphas")


@pytest.mark.parametrize("method", ["svfit", "loldu", "seeded"])
def test_other_alphas_add(method, tmp_path):
    (a, da) = trained(tmp_path / "a", method, 1, r=4, alpha=4)
    (b, db) = trained(tmp_path / "b", method, 2, r=4, alpha=10, scaling="rslora")
    both = deltas(smidgen.load(Net(), smidgen.combine([a, b], [0.5, 2], out=tmp_path / "sum")))
    for target in da:
        testing.close(both[target], 0.5 * da[target] + 2 * db[target], target)


def other_base():
    net = Net()
    net.up.weight.data += 0.3
    return net


REFUSED = [
    (("svfit", {}), ("loldu", {}), "two methods"),
    (("svfit", {"r": 4}), ("svfit", {"r": 5}), "differ in r at"),
    (("svfit", {"relative": True}), ("svfit", {}), "differ in relative"),
    (("svfit", {"nonneg": True}), ("svfit", {"nonneg": True}), "nonneg"),
    (("seeded", {"seed": 1}), ("seeded", {"seed": 2}), "different seeds"),
    (("loldu", {"atoms": "raw"}), ("loldu", {}), "differ in atoms"),
    (("svfit", {}), ("svfit", {"target_modules": ["up"]}), "different layers"),
    (("lora", {}), ("lora", {"base": other_base}), "different bases"),
    (("tlora", {}), ("tlora", {}), "do not add"),
    (("oft", {"block_size": 4}), ("oft", {"block_size": 4}), "do not add"),
]


@pytest.mark.parametrize("a, b, match", REFUSED)
def test_what_has_no_exact_sum_is_refused_and_nothing_is_written(a, b, match, tmp_path):
    folders = []
    for k, (method, options) in enumerate((a, b)):
        options = {name: value() if name == "base" else value for name, value in options.items()}
        folders.append(trained(tmp_path / str(k), method, k, **options)[0])
    with pytest.raises(SmidgenError, match=match):
        smidgen.combine(folders, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_sources_and_damage(tmp_path):
    a, b = (trained(tmp_path / name, "svfit", 1)[0] for name in "ab")
    for weights, match in (([1.0], "2 finite weights"), ([1.0, float("nan")], "2 finite weights")):
        with pytest.raises(SmidgenError, match=match):
            smidgen.combine([a, b], weights, out=tmp_path / "out")
    with pytest.raises(SmidgenError, match="at least two"):
        smidgen.combine([a], out=tmp_path / "out")
    smidgen.save(smidgen.adapt(Net(), LoraConfig(r=2, target_modules=["up"])), tmp_path / "peft")
    with pytest.raises(SmidgenError, match="LORA"):
        smidgen.combine([a, tmp_path / "peft"], out=tmp_path / "out")
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(SmidgenError, match="adapter_config"):
        smidgen.combine([a, b], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_are_the_same_or_averaged_or_refused(tmp_path, caplog):
    def with_head(name, seed, head):
        model = smidgen.adapt(Net(), "svfit", target_modules=["up"], modules_to_save=["head"])
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.requires_grad:
                    p.add_(0.1 * (head if "head" in key else seed))
        smidgen.save(model, tmp_path / name)
        return tmp_path / name, model

    (a, _), (b, mb), (same, _) = (with_head(n, s, h) for n, s, h in (("a", 1, 1), ("b", 2, 2), ("same", 3, 1)))
    smidgen.combine([a, same], [2, 2], out=tmp_path / "kept")
    smidgen.load(Net(), tmp_path / "kept")
    for weights, average in (([0.5, 0.5], False), ([1, 1], True)):
        with pytest.raises(SmidgenError, match=r"(?i)heads do not add.*(--average-heads|that sum to one, not)"):
            smidgen.combine([a, b], weights, out=tmp_path / "out", average_heads=average)
    smidgen.combine([a, b], out=tmp_path / "mean", average_heads=True)
    assert "Heads are averaged" in caplog.text
    found = smidgen.load(Net(), tmp_path / "mean").head.modules_to_save["default"].weight
    testing.close(found, mb.head.modules_to_save["default"].weight - 0.05, "between the two")


def test_the_command(tmp_path, capsys):
    from smidgen.cli.dispatch import main

    a, b = (trained(tmp_path / name, "svfit", 1)[0] for name in "ab")
    assert main(["combine", str(a), str(b), "--weights", ".5,.5", "--out", str(tmp_path / "c")]) in (0, None)
    assert "svfit" in capsys.readouterr().out
    smidgen.load(Net(), tmp_path / "c")
    assert main(["combine", str(a), str(b), "--weights", "a,b", "--out", str(tmp_path / "d")]) == 2
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("by", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("method, options", [("svfit", {"r": 12}), ("lora", {"r": 3, "alpha": 6})])
def test_merges_are_pefts_own(by, method, options, tmp_path):
    from peft.utils import merge_utils

    made = [trained(tmp_path / str(seed), method, seed, **options) for seed in range(3)]
    weights = [0.5, 0.5, 1.0]
    folders = [folder for folder, _ in made]
    smidgen.combine(folders, weights, out=tmp_path / "one", by=by, density=1.0, seed=3)
    smidgen.combine(folders, weights, out=tmp_path / "half", by=by, density=0.5, seed=3)
    found = deltas(smidgen.load(Net(), tmp_path / "one"))
    if by in ("dare_linear", "magnitude_prune"):  # with nothing pruned the sum
        for target, delta in found.items():
            wanted = sum(w * d[target] for w, (_, d) in zip(weights, made, strict=True))
            testing.close(delta, wanted, target, factor=10)
    elif method == "lora":
        for target, delta in found.items():
            wanted = merge_utils.ties([d[target] for _, d in made], torch.tensor(weights), 1.0)
            u, s, v = torch.linalg.svd(wanted)
            testing.close(delta, u[:, :9] * s[:9] @ v[:9], target, factor=10)
    half = deltas(smidgen.load(Net(), tmp_path / "half"))
    assert all(bool((half[name] - found[name]).abs().max() > 1e-3) for name in found)
    with pytest.raises(SmidgenError, match="Did you mean 'ties'"):
        smidgen.combine(folders, weights, out=tmp_path / "no", by="tise")
    with pytest.raises(SmidgenError, match="density is a share"):
        smidgen.combine(folders, weights, out=tmp_path / "no", by=by, density=0.0)
