"""Low-rank factors of any adapter: exact at full rank, the best of their rank, judged on rows nothing was fitted to."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import smidgen
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import ConfigError, SmidgenError
from smidgen.training import truncation
from smidgen.training.truncation import Truncation, cut, layer_loss, truncate

METHODS = {
    "oft": {"block_size": 4},
    "tlora": {"transform_rank": 2},
    "tlora_star": {"r": 2},
    "rotation+spectral": {"r": 3, "block_size": 4},
}


class Net(nn.Module):
    """Linear layers, and a convolution whose stride, padding mode and dilation the patches must follow."""

    def __init__(self, padding_mode: str = "zeros") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, padding_mode=padding_mode)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.conv(x).mean((-2, -1)))))


def rows(seed: int, count: int = 24) -> torch.Tensor:
    """Images [n, 8, 6, 6] whose channels are far from equally strong, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, 8)
    return torch.einsum("nchw,dc->ndhw", torch.randn(count, 8, 6, 6, generator=generator), mix)


def adapted(method: str, padding_mode: str = "zeros", std: float = 0.3):
    model = smidgen.adapt(Net(padding_mode), method, target_modules=["conv", "up", "down"], **METHODS[method])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def runs(model, seed: int):
    return lambda: model(rows(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_exact(method: str, weighted: bool) -> None:
    model = adapted(method)
    smidgen.set_strength(model, 0.7)
    wanted, changes = (
        runs(model, 2)(),
        {n: a.get_delta_weight("default").detach() for n, a in adapted_layers(model).items()},
    )
    found = truncate(model, runs(model, 2), rank=99, calibration=runs(model, 3) if weighted else None)
    assert found.loss.end_to_end < 5e-6  # of outputs in fp32
    assert all(loss.weight < 1e-6 and loss.activation < 1e-6 for loss in found.loss.layers.values())
    for name, own in found.factors.items():
        change = changes[name].flatten(1)
        assert float((own.dense() - change).norm()) < 1e-6 * float(change.norm())
        assert own.up.shape == (len(change), min(change.shape)) and own.up.dtype == torch.float32
    assert torch.equal(runs(model, 2)(), wanted), "the model was changed"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_inputs_are_what_a_layers_matrix_is_multiplied_with(mode: str) -> None:
    model = adapted("oft", mode)
    layers, seen = adapted_layers(model), {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y)))
    found = truncation.layer_inputs(layers, runs(model, 2))
    for name, layer in layers.items():
        x, y = seen[name]
        bias = layer.get_base_layer().bias
        own = layer.kind.transform(layer.slot("default").transformed, x, layer.get_base_layer())
        patches = torch.cat(list(truncation._rows(layer, own)))
        told = (patches @ layer.base_matrix().T + bias).reshape(-1)
        shown = (y.flatten(2).mT if y.dim() == 4 else y).reshape(-1)
        assert torch.allclose(told, shown, atol=1e-5), name
        assert found[name].shape == (min(len(patches), 4096), layer.base_matrix().shape[1])


@pytest.mark.parametrize("method", ["oft", "tlora", "tlora_star"])
def test_error_falls_with_rank_and_weighing_helps_on_other_rows(method: str) -> None:
    model = adapted(method)
    plain = Truncation(model, runs(model, 2))
    weighted = Truncation(model, runs(model, 2), calibration=runs(model, 3))
    for own in (plain, weighted):
        losses = [own.at(dict.fromkeys(own.cuts, rank)).loss for rank in (1, 2, 4, 8, 12)]
        weights = [[loss.layers[name].weight for loss in losses] for name in own.cuts]
        assert all(a >= b - 1e-9 for errors in weights for a, b in pairwise(errors))
        assert losses[0].end_to_end > losses[2].end_to_end > losses[-1].end_to_end
    for rank in (1, 2, 3):
        a, b = (own.at(dict.fromkeys(own.cuts, rank)).loss.layers for own in (plain, weighted))
        assert sum(loss.activation for loss in b.values()) < sum(loss.activation for loss in a.values())
        assert all(b[name].weight >= a[name].weight - 1e-6 for name in a), "nothing beats the plain SVD in the weight"


def test_plain_factors_are_the_svds_and_their_errors_are_told_for_each_rank() -> None:
    change, x = torch.randn(10, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    values = torch.linalg.svdvals(change)
    best = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt()  # [i]: without the first i
    found = cut(change, 10)
    assert torch.allclose(found.errors()[:-1], best[1:], atol=1e-6)
    shown = cut(change, 10, x)
    for rank in (1, 4, 9):
        loss = layer_loss(change, shown.factors(rank), x)
        assert abs(loss.activation - float(shown.errors()[rank - 1])) < 1e-5 and loss.rank == rank
        assert abs(layer_loss(change, found.factors(rank), None).weight - float(best[rank])) < 1e-5


def test_factors_fit_into_16_bits() -> None:
    change = torch.randn(20, 20) @ torch.diag(torch.logspace(0, -6, 20))
    up, _, down, _ = cut(change * 1e-3, 8).factors(8)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_auto_is_the_least_rank_below_the_bound() -> None:
    model = adapted("oft")
    options = {"calibration": runs(model, 3), "allow_loss": True}
    found = truncate(model, runs(model, 2), rank="auto", max_loss=0.1, **options)
    rank = max(found.loss.ranks.values())
    assert 1 < rank < 12 and found.loss.end_to_end <= 0.1
    assert truncate(model, runs(model, 2), rank=rank - 1, **options).loss.end_to_end > 0.1
    assert truncate(model, runs(model, 2), calibration=runs(model, 3)).loss.end_to_end <= truncation.AUTO_LOSS


def test_a_few_rows_search_and_all_rows_judge() -> None:
    model = adapted("oft")
    counts = {"few": 0, "all": 0}

    def run(name: str, count: int):
        def passes():
            counts[name] += 1
            return model(rows(2, count))

        return passes

    options = {"calibration": runs(model, 3), "max_loss": 0.1}
    found = truncate(model, run("all", 96), search=run("few", 2), **options)
    assert counts["few"] > 5 and found.loss.end_to_end <= 0.1, "the rank was not looked for by few rows and held to all"
    judged, counts["few"], counts["all"] = counts["all"], 0, 0
    truncate(model, run("all", 96), **options)
    assert counts["few"] == 0 and counts["all"] > judged >= 3


def test_the_interval_holds_what_more_rows_say() -> None:
    """Rows of very unequal size, whose errors are no share of their effects: 95 of 100 intervals hold the truth."""
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(400, 200, generator=generator).exp().double()
    errors = 0.01 * torch.randn(400, 200, generator=generator).square().double() * effects.sqrt()
    truth, _ = truncation.ratio(errors.flatten(), effects.flatten())
    intervals = [truncation.ratio(e, d)[1] for e, d in zip(errors, effects, strict=True)]
    held = sum(low <= truth <= high for low, high in intervals) / len(intervals)
    assert 0.91 < held < 0.98
    assert truncation.ratio(torch.zeros(3), torch.ones(3)) == (0.0, (0.0, 0.0))
    assert truncation.ratio(torch.ones(1), torch.ones(1)) == (1.0, (0.0, float("inf")))


def test_rows_of_one_source_count_once() -> None:
    """The same rows thrice tell no more than once; taken for rows of their own they would seem to."""
    model = adapted("tlora")

    def told(copies: int, groups: int | None):
        inputs = torch.cat([rows(2, 20)] * copies)
        return truncate(model, lambda: model(inputs), rank=4, allow_loss=True, groups=groups).loss

    once, thrice, counted = told(1, None), told(3, 20), told(3, None)
    assert thrice.end_to_end == pytest.approx(once.end_to_end, rel=1e-4)
    assert thrice.interval == pytest.approx(once.interval, rel=1e-3)
    assert counted.interval[1] < 0.98 * once.interval[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_max_error_gives_each_layer_its_rank(weighted: bool) -> None:
    model = adapted("oft")
    calibration = runs(model, 3) if weighted else None
    found = truncate(model, runs(model, 2), max_error=0.2, calibration=calibration, allow_loss=True)
    assert len(set(found.loss.ranks.values())) > 1
    own = Truncation(model, runs(model, 2), calibration=calibration)
    for name, rank in found.loss.ranks.items():
        errors = own.cuts[name].errors()
        assert errors[rank - 1] <= 0.2 and (rank == 1 or errors[rank - 2] > 0.2)


def test_what_it_says_is_what_the_factors_do() -> None:
    model = adapted("tlora")
    found = truncate(model, runs(model, 2), rank=4, allow_loss=True, judged_on="24 rows")
    on = runs(model, 2)()
    with smidgen.disabled(model):
        off = runs(model, 2)()
    plain = Net()
    with torch.no_grad():
        for name, own in found.factors.items():
            weight = plain.get_submodule(name).weight
            weight += own.dense().reshape(weight.shape)
    again = float((plain(rows(2)) - on).norm() / (on - off).norm())
    assert found.loss.end_to_end == pytest.approx(again, rel=1e-4)
    told = json.loads(json.dumps(found.loss.facts()))["loss"]
    assert told["interval"][0] < told["end_to_end"] < told["interval"][1]
    assert told["end_to_end"] == found.loss.end_to_end and told["judged_on"] == "24 rows" and told["rank"] == 4
    worst = told["weight_error"]["worst_layer"]
    assert told["weight_error"]["worst"] == max(loss.weight for loss in found.loss.layers.values())
    assert worst in found.loss.layers and "weighted_by" not in told
    assert "end to end" in str(found.loss) and worst in str(found.loss)


def test_losing_much_is_refused_unless_allowed() -> None:
    model = adapted("oft")
    with pytest.raises(SmidgenError, match=r"At rank 1 the export does \d+% .*more than the 15%.*--allow-loss"):
        truncate(model, runs(model, 2), rank=1)
    assert truncate(model, runs(model, 2), rank=1, allow_loss=True).loss.end_to_end > 0.15


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "rank is a whole number"),
        ({"rank": True}, "rank is a whole number"),
        ({"rank": "high"}, "or auto"),
        ({"rank": 4, "max_error": 0.1}, "give one of them"),
        ({"rank": 4, "max_loss": 0.1}, "max_loss chooses the rank auto"),
        ({"max_error": 1.5}, "max_error is a share"),
        ({"max_loss": 0.0}, "max_loss is a share"),
    ],
)
def test_settings_without_meaning(options, words: str) -> None:
    model = adapted("oft")
    with pytest.raises(ConfigError, match=words):
        truncate(model, runs(model, 2), **options)


def test_what_cannot_be_cut_is_refused_in_a_sentence(monkeypatch) -> None:
    with pytest.raises(SmidgenError, match="changes nothing"):
        truncate(model := smidgen.adapt(Net(), "oft", target_modules=["up"]), runs(model, 2))
    svfit = smidgen.adapt(Net(), "svfit", r=4, target_modules=["up", "conv"])
    with pytest.raises(SmidgenError, match=r"of low rank by its own factors.*nothing to cut"):
        truncate(svfit, runs(svfit, 2), rank=2)
    with pytest.raises(SmidgenError, match="carries no adapter 'other'"):
        truncate(model := adapted("oft"), runs(model, 2), "other")
    for layer in adapted_layers(model).values():
        layer.merge()
    with pytest.raises(SmidgenError, match="merged at 'conv'"):
        truncate(model, runs(model, 2))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    smidgen.adapt(grouped, "oft", block_size=4, target_modules=["0"])
    with pytest.raises(SmidgenError, match="convolution in groups"):
        truncate(grouped, lambda: grouped(rows(2)))
    monkeypatch.setattr(truncation, "MOST_RANK", 2)
    with pytest.raises(SmidgenError, match="No rank up to 2 keeps the end-to-end loss"):
        truncate(model := adapted("oft"), runs(model, 2), max_loss=0.01)
    with pytest.raises(SmidgenError, match="No rank up to 2 keeps the error at 'conv'"):
        truncate(model, runs(model, 2), max_error=0.01)


def test_the_model_is_left_as_it_was_when_a_pass_fails() -> None:
    model, calls = adapted("oft"), []

    def fails():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return model(rows(2))

    wanted = model.train()(rows(2))
    with pytest.raises(RuntimeError):
        truncate(model, fails, rank=4)
    assert model.training and torch.equal(model(rows(2)), wanted)
    assert all("forward" not in layer.__dict__ for layer in adapted_layers(model).values())


def test_a_layer_that_no_row_reaches_has_no_activation_error() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(12, 12)

    model = smidgen.adapt(Spare(), "oft", block_size=4, target_modules=["up", "other"])
    nn.init.normal_(next(p for p in model.parameters() if p.requires_grad), std=0.3)
    found = truncate(model, runs(model, 2), rank=12, calibration=runs(model, 3))
    assert found.loss.layers["other"].activation is None and found.loss.layers["up"].activation is not None


def test_rows_are_drawn_evenly_from_all_that_come() -> None:
    sample = truncation._Sample(100)
    for start in range(0, 1000, 250):
        sample.add(torch.arange(start, start + 250.0)[:, None])
    kept = sample.rows[0].flatten()
    assert len(kept.unique()) == 100 and 400 < float(kept.mean()) < 600
