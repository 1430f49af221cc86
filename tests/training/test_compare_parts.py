"""The comparison's pure parts: experiment files, statistics against values worked out by hand, the front, the claim."""

from dataclasses import replace

import pytest

from smidgen.errors import ConfigError
from smidgen.lab import statistics
from smidgen.lab.compare.experiment import Experiment, load_experiment
from smidgen.lab.compare.subsets import shortened
from smidgen.lab.statistics import Point
from smidgen.training import settings
from tests.training.compare_fakes import experiment


def test_experiments_survive_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(settings.dump_yaml(experiment()))
    assert load_experiment(path) == experiment()


@pytest.mark.parametrize("name", ["debug", "tweets", "emoji", "wordnet"])
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
        ({"search": {"stepz": 3}}, "Unknown key 'search.stepz'.*steps"),
        ({"settings": {"data": {"path": "x", "max_lenght": 3}}}, "max_lenght.*max_length"),
        ({"settings": {"train": {"seed": 3}}}, "train.seed is decided by the comparison"),
        ({"settings": {"out": "here"}}, "out is decided by the comparison"),
        ({"settings": {"train": {"eval_steps": 0}}}, "eval_steps must be at least 1"),
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


def test_differences_are_paired_by_seed():
    # the methods vary widely over seeds, but always together: the difference is certain
    first, second = {0: 0.5, 1: 0.9, 2: 0.7}, {2: 0.6, 1: 0.8, 0: 0.4, 9: 0.0}
    found = statistics.paired_difference(first, second)
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0.0, abs=1e-9) and found.n == 3
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None


def points():
    return [
        Point("tiny", 500, 0.50, {0: 0.90, 1: 0.90}),  # best on test, but validation does not know
        Point("small", 2_000, 0.60, {0: 0.61, 1: 0.63}),
        Point("useless", 5_000, 0.55, {0: 0.56, 1: 0.58}),
        Point("large", 9_000, 0.70, {0: 0.71, 1: 0.69}),
        Point("same", 9_500, 0.70, {0: 0.75, 1: 0.75}),
    ]


def test_the_front_is_chosen_on_validation():
    assert [point.name for point in statistics.front(points())] == ["tiny", "small", "large"]
    assert statistics.best_under(points(), 8_999).name == "small"
    assert statistics.best_under(points(), 9_000).name == "large"
    assert statistics.best_under(points(), 499) is None
    assert statistics.front([]) == []


def test_the_front_of_a_loss_goes_down():
    assert [point.name for point in statistics.front(points(), greater_is_better=False)] == ["tiny"]
    assert statistics.best_under(points()[1:], 1e6, greater_is_better=False).name == "useless"


@pytest.mark.parametrize(
    ("ours", "greater", "verdict"),
    [
        ({0: 0.80, 1: 0.81, 2: 0.82}, True, "ours"),
        ({0: 0.80, 1: 0.81, 2: 0.82}, False, "peft"),
        ({0: 0.60, 1: 0.61, 2: 0.62}, True, "peft"),
        ({0: 0.60, 1: 0.90, 2: 0.70}, True, "undecided"),
        ({0: 0.80}, True, "undecided"),
    ],
)
def test_the_verdict_at_a_budget(ours, greater, verdict):
    mine, theirs = [Point("a", 10, 0.5, ours)], [Point("b", 20, 0.5, {0: 0.70, 1: 0.71, 2: 0.72})]
    assert statistics.at_budget(50, mine, theirs, greater).verdict == verdict
    assert [
        statistics.at_budget(n, *both, greater).verdict for n in (5, 15) for both in ((mine, theirs), (theirs, mine))
    ] == ["none"] * 4


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize(
    ("lost", "numbers", "verdict"),
    [
        ((0.002, 0.003, 0.004), 100, "holds"),
        ((-0.05, -0.06, -0.04), 100, "holds"),  # better
        ((0.002, 0.003, 0.004), 101, "fails"),  # not 16 times fewer
        ((0.040, 0.041, 0.042), 100, "fails"),
        ((-0.02, 0.02, 0.03), 100, "not decided"),
    ],
)
def test_the_claim_is_decided_by_a_whole_interval_and_the_size(greater, lost, numbers, verdict):
    baseline = {0: 0.79, 1: 0.80, 2: 0.81}
    sign = 1 if greater else -1
    scores = {"LoRA": baseline, "a": {seed: baseline[seed] - sign * lost[seed] for seed in baseline}}
    found = statistics.check_claim("a", "LoRA", scores, {"LoRA": 1600, "a": numbers}, 16, 0.01, greater)
    assert found.verdict == verdict
    assert statistics.check_claim("a", "LoRA", {n: {0: s[0]} for n, s in scores.items()}, {"LoRA": 1600, "a": 100}, 16, 0.01).verdict == "not decided"  # fmt: skip


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
