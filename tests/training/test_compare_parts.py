"""The comparison's pure parts: experiment files, statistics against values worked out by hand, the front, the claim."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smidgen.errors import ConfigError
from smidgen.lab import statistics
from smidgen.lab.compare import answers as answers_as_text
from smidgen.lab.compare import codec
from smidgen.lab.compare.experiment import Experiment, Round, load_experiment
from smidgen.lab.compare.search import Choice, halving
from smidgen.lab.compare.subsets import shortened
from smidgen.lab.statistics import ClaimResult, Difference, Point
from smidgen.training import settings
from tests.training.compare_fakes import experiment


def test_experiments_survive_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(settings.dump_yaml(experiment()))
    assert load_experiment(path) == experiment()


@pytest.mark.parametrize("name", ["debug", "tweets", "scheme", "foods", "mpnet", "fashion", "wordnet"])
def test_shipped_experiments_are_valid(name):
    found = load_experiment(name)
    assert found.name == name
    assert {"ours", "peft"} <= {method.family for method in found.methods}


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(ConfigError, match="tweets"):
        load_experiment("tweet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seedz": [1]}, "Unknown key 'seedz'.*seeds"),
        ({"search": {"roundz": []}}, "Unknown key 'search.roundz'.*rounds"),
        ({"search": {"rounds": [{"steps": 3, "keep": 2}]}}, "the last of which keeps 1 rate"),
        ({"settings": {"data": {"path": "x", "max_lenght": 3}}}, "max_lenght.*max_length"),
        ({"settings": {"train": {"seed": 3}}}, "train.seed is decided by the comparison"),
        ({"settings": {"out": "here"}}, "out is decided by the comparison"),
        ({"settings": {"train": {"eval_steps": 5}}}, "train.eval_steps is decided by the comparison"),
        ({"settings": {"head": "fresh"}}, "head is decided by the comparison"),
        ({"formats": ["int3"]}, "formats"),
        ({"methods": [{"name": "a", "kind": "linear probe", "rates": [0.1]}]}, "without a learning rate"),
        ({"methods": [{"name": "a", "kind": "svfit", "rates": [0.1], "rank": 3}]}, r"Unknown key 'methods\[0\].rank'"),
        ({"methods": [{"name": "a", "kind": "svfit", "rates": [0.2, 0.1]}]}, "must ascend"),
        ({"methods": [{"name": "a", "kind": "svfit", "rates": []}]}, "needs learning rates"),
        ({"methods": [{"name": "a", "kind": "svfit", "rates": [0.1]}] * 2}, "'a' is there twice"),
        ({"seeds": [0, 100]}, "search needs a seed of its own"),
        ({"claim": {"methods": ["svfti"], "baseline": "svfit"}}, "no method 'svfti'.*svfit"),
        ({"recipe": "regression"}, "recipe must be one of"),
    ],
)
def test_what_an_experiment_refuses(change, message):
    values = settings.to_dict(experiment()) | change
    with pytest.raises(ConfigError, match=message):
        settings.from_dict(Experiment, values)


def test_every_method_gets_as_many_rates():
    one = experiment()
    uneven = (replace(one.methods[0], rates=(0.1, 0.2, 0.3)), *one.methods[1:])
    with pytest.raises(ConfigError, match="same number of learning rates"):
        replace(one, methods=uneven)


def test_only_keeps_what_is_named():
    one = experiment()
    assert [method.name for method in one.only(["LoRA"]).methods] == ["LoRA"]
    assert one.only(["LoRA"]).claim is None and one.only(["svfit", "LoRA"]).claim == one.claim
    assert one.only(None) is one
    with pytest.raises(ConfigError, match="no method 'LoRa'"):
        one.only(["LoRa"])


def test_the_interval_by_hand():
    # values 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3)
    found = statistics.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.n == 3
    assert found.half == pytest.approx(2.484138, abs=1e-5)
    # two values a distance d apart: t(0.975, 1) = 12.7062, deviation d / sqrt(2)
    assert statistics.interval([0.0, 2.0]).half == pytest.approx(12.7062, abs=1e-3)
    alone = statistics.interval([0.7])
    assert (alone.mean, alone.low, alone.high, alone.half) == (0.7, None, None, 0.0)


def table(seeds, examples, of_seed, of_example, rest, rng):
    """Differences [seed, example] of mean 0."""
    return (
        of_seed * rng.normal(size=(seeds, 1))
        + of_example * rng.normal(size=(1, examples))
        + rest * rng.normal(size=(seeds, examples))
    )


@pytest.mark.parametrize("parts", [(1.0, 0.0, 0.1), (0.0, 1.0, 0.1), (0.05, 1.0, 0.5)])
def test_the_bootstrap_covers_seeds_and_examples(parts):
    rng, hits, halves = np.random.default_rng(1), 0, []
    for draw in range(120):
        own = table(5, 100, *parts, rng)
        found = statistics.paired_difference(own, np.zeros_like(own), draws=600, seed=draw)
        hits += found.low <= 0 <= found.high
        halves.append(found.half)
    assert hits / 120 > 0.88  # .93 or more of many draws
    if parts[0] == 0:  # no wider than the examples call for
        assert np.mean(halves) == pytest.approx(1.96 / 10, rel=0.1)


def test_differences_are_paired_by_seed_and_example():
    # the methods vary widely over seeds and examples, but always together: the difference is certain
    rng = np.random.default_rng(0)
    second = {seed: rng.normal(size=50) for seed in (0, 1, 2)}
    first = {seed: second[seed] + 0.1 for seed in (2, 1, 0)} | {9: np.zeros(50)}
    found = statistics.paired(first, second)
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0.0, abs=1e-9)
    assert (found.seeds, found.examples) == (3, 50) and found.p < 0.001
    assert statistics.paired({0: np.ones(3)}, {1: np.ones(3)}) is None
    alone = statistics.paired({0: np.ones(3)}, {0: np.zeros(3)})
    assert (alone.low, alone.high, alone.p) == (None, None, 1.0)
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.paired_difference(np.ones((2, 3)), np.ones((2, 4)))


def test_holm_by_hand():
    assert statistics.holm([]) == [] and statistics.holm([0.2]) == [0.2]
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, never falling: .02 .03 .06 .06
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def answers(mean, seeds=3, examples=400, seed=0):
    """Test losses that scatter a little over seeds, and the scores that go with them."""
    rng = np.random.default_rng(seed)
    own = {n: mean + 0.2 * rng.normal(size=examples) + 0.002 * rng.normal() for n in range(seeds)}
    return own, {n: 1 - losses for n, losses in own.items()}


def points():
    return [
        Point("tiny", 500, 0.50, *answers(0.1)),  # best on test, but validation does not know
        Point("small", 2_000, 0.40, *answers(0.4)),
        Point("useless", 5_000, 0.45, *answers(0.45)),
        Point("large", 9_000, 0.30, *answers(0.3)),
        Point("same", 9_500, 0.30, *answers(0.2)),
    ]


def test_the_front_is_chosen_on_validation():
    assert [point.name for point in statistics.front(points())] == ["tiny", "small", "large"]
    assert statistics.best_under(points(), 8_999).name == "small"
    assert statistics.best_under(points(), 9_000).name == "large"
    assert statistics.best_under(points(), 499) is None
    assert statistics.front([]) == []


def test_the_verdicts_at_budgets():
    theirs = [Point("b", 20, 0.5, *answers(0.5, seed=1))]

    def found(mean, budgets=(5, 50, 60), **changes):
        mine = [Point("a", 10, 0.5, *answers(mean, seed=2, **changes))]
        return [one.verdict for one in statistics.at_budgets(budgets, mine, theirs)]

    assert found(0.4) == ["none", "ours", "ours"] and found(0.6) == ["none", "peft", "peft"]
    assert found(0.5) == ["none", "undecided", "undecided"]
    assert found(0.4, seeds=1) == ["none", "undecided", "undecided"]  # one shared seed


def test_a_win_among_many_budgets_must_be_surer():
    theirs, gap = [Point("b", 20, 0.5, *answers(0.5, examples=60, seed=1))], 0.09
    mine = [Point("a", 10, 0.5, *answers(0.5 - gap, examples=60, seed=2))]
    (alone,) = statistics.at_budgets([50], mine, theirs)
    several = statistics.at_budgets([50] * 8, mine, theirs)
    assert several[0].p == pytest.approx(min(1.0, 8 * alone.p))


@pytest.mark.parametrize(
    ("lost", "numbers", "verdict"),
    [
        ((0.002, 0.004), 100, "holds"),
        ((-0.06, -0.04), 100, "holds"),  # better
        ((0.002, 0.004), 101, "fails"),  # not 16 times fewer
        ((0.040, 0.042), 100, "fails"),
        ((-0.02, 0.03), 100, "undecided"),
        ((0.005, 0.02), 100, "undecided"),
    ],
)
def test_the_claim_is_decided_by_a_whole_interval_and_the_size(lost, numbers, verdict):
    difference = Difference(-sum(lost) / 2, -lost[1], -lost[0], 0.5, 5, 100)
    found = ClaimResult("a", "LoRA", difference, numbers, 1600, 16, 0.01)
    assert found.verdict == verdict
    untold = replace(found, told_apart=False).verdict
    assert untold == ("cannot tell" if verdict == "holds" else verdict)
    assert replace(found, difference=Difference(0.0, None, None, 1.0, 1, 100), numbers=100).verdict == "undecided"


# ---- halving ---------------------------------------------------------------------------------------------------------

RATES, ROUNDS = (1e-3, 1e-2, 1e-1), (Round(10, 2), Round(40, 1))


def search(best, extensions=4, failing=()):
    """Everything that is trained for a method whose loss is lowest at ``best`` (by round), one training at a time."""
    done = {}
    while True:
        wanted, choice = halving(RATES, ROUNDS, extensions, lambda rate, n: done.get((rate, n)))
        new = [training for training in wanted if training not in done]
        if choice is not None:
            assert not new
            return wanted, choice
        rate, n = new[0]
        done[rate, n] = -math.inf if rate in failing else -abs(math.log10(rate) - math.log10(best[n]))


def test_halving_keeps_the_best_of_each_round():
    wanted, choice = search((1e-2, 1e-2))
    assert wanted[:3] == [(rate, 0) for rate in RATES] and {training[0] for training in wanted[3:]} <= set(RATES)
    assert len(wanted) == 6 and choice == Choice(1e-2, 0.0, RATES, False)


def test_a_rate_that_fewer_steps_dropped_comes_back_when_the_best_lies_beside_it():
    rates, rounds = (1e-3, 1e-2, 1e-1, 1.0, 10.0), (Round(10, 2), Round(40, 1))
    done, best = {}, (1e-2, 1.0)  # ten steps want little, forty want much
    while True:
        wanted, choice = halving(rates, rounds, 4, lambda rate, n: done.get((rate, n)))
        if choice is not None:
            break
        for rate, n in wanted:
            done[rate, n] = -abs(math.log10(rate) - math.log10(best[n]))
    assert choice.rate == 1.0 and not choice.at_edge
    assert [rate for rate, n in wanted if n == 1] == [1e-2, 1e-3, 1e-1, 1.0, 10.0]


def test_a_winner_at_the_edge_extends_its_grid_until_it_lies_inside():
    wanted, choice = search((1.0, 1.0))
    assert choice.rate == 1.0 and choice.grid == (1e-3, 1e-2, 1e-1, 1.0, 10.0) and not choice.at_edge
    assert [rate for rate, n in wanted if n == 0] == [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    later, choice = search((1e-2, 1e-4))  # more steps want a lower rate
    assert choice.rate == 1e-4 and choice.grid[0] == 1e-5 and not choice.at_edge
    assert (1e-4, 1) in later and (1e-4, 0) not in later
    assert search((1e-9, 1e-9), extensions=2)[1].at_edge


def test_rates_that_fail_are_not_kept():
    wanted, choice = search((1.0, 1.0), failing=(1.0,))
    assert choice.rate == 1e-1 and not choice.at_edge and (1.0, 1) not in wanted
    assert search((1.0, 1.0), failing=RATES)[1].failed


# ---- the codec -------------------------------------------------------------------------------------------------------


def test_one_codec_for_all():
    torch.manual_seed(0)
    tensors = {f"layer.{n}.q.lora_{side}.default.weight": torch.randn(4, 8) for n in range(12) for side in "AB"}
    tensors |= {"layer.3.q.vera_lambda.default": torch.randn(8), "LayerNorm.bias": torch.randn(8)}
    sizes = {}
    for each, most in {"float32": 0.0, "float16": 1e-3, "int8": 1e-2, "int4": 0.2}.items():
        back, sizes[each] = codec.stored(tensors, each)
        assert back.keys() == tensors.keys() and all(back[n].shape == t.shape for n, t in tensors.items())
        error = sum(float((back[n] - t).norm()) for n, t in tensors.items()) / sum(
            float(t.norm()) for t in tensors.values()
        )
        assert (error == 0) == (most == 0) and error <= most
    numbers = sum(t.numel() for t in tensors.values())
    header = sizes["float32"] - 4 * numbers
    assert header < 600  # four kinds of tensor, however many layers
    assert sizes["float16"] - 2 * numbers == pytest.approx(header, abs=16)
    assert sizes["int4"] - numbers / 2 < header + numbers / 32 + 16
    assert codec.stored({}, "int4") == ({}, 0)


def test_configs_are_counted_alike():
    import peft

    import smidgen

    lora = peft.LoraConfig(r=4, target_modules=["query", "value"])
    assert codec.config_bytes(lora) < 110 < codec.config_bytes(peft.LoraConfig(r=4, target_modules=["a" * 100]))
    ours = smidgen.config("svfit", r=4, target_modules=["query", "value"])
    assert codec.config_bytes(ours) < 140
    assert codec.config_bytes(None) == 0


def test_answers_survive_their_text():
    values = np.random.default_rng(0).normal(size=5_000)
    text = answers_as_text.to_text(values)
    assert np.allclose(answers_as_text.from_text(text), values, atol=1e-6)


def test_shortened_splits_are_the_same_every_time():
    from smidgen.lab.compare.recipes import prepare

    one = load_experiment("debug")
    first, second = (prepare(one.recipe, one.config(seed)).task for seed in (0, 1))
    whole = len(first.splits["train"])
    few = [shortened(task, train=5) for task in (first, second)]
    assert len(few[0].splits["train"]) == 5 and few[0].splits["train"].names == few[1].splits["train"].names
    assert few[0].splits["train"].rows == few[1].splits["train"].rows and len(few[0].splits["train"].labels) == 5
    assert len(shortened(first, train=10**6).splits["train"]) == whole == len(first.splits["train"])


def test_the_command_names_what_it_does_not_know(capsys, tmp_path):
    from smidgen.cli import main

    assert main(["compare", "tweeds", "--out", str(tmp_path / "out")]) == 2
    assert "Did you mean 'tweets'" in capsys.readouterr().err
    assert main(["compare", "debug", "--only", "svft", "--out", str(tmp_path / "out")]) == 2
    assert "no method 'svft'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["compare", "debug", "--stage", "report", "--out", str(tmp_path / "out")]) == 2
    assert "run the experiment first" in capsys.readouterr().err
