"""The audit's pure parts: intervals, regressions, distances, the table."""

import math
import re

import numpy
import pytest
import torch
from PIL import Image

from smidgen.errors import ConfigError, DataError
from smidgen.lab.audit import regression
from smidgen.lab.audit.distances import DeltaComponents, comparable, distances, entries, nearest, squares
from smidgen.lab.audit.memorisation import like_neighbour, spread
from smidgen.lab.audit.report import BASE, PERSONAL, REAL, Report, as_json, as_markdown
from smidgen.lab.audit.scenes import difference
from smidgen.lab.audit.scores import Score, Scores, key_of
from smidgen.lab.audit.settings import Drawing, EvaluateConfig
from smidgen.lab.audit.statistics import bootstrap, paired, ratio
from tests.difflora.helpers import layout, numbers

# ---- intervals -------------------------------------------------------------------------------------------------------


def test_bootstrap_is_percentiles_of_resampled_means():
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    rng = numpy.random.default_rng(3)
    chosen = rng.integers(5, size=(200, 5))
    means = sorted(sum(values[i] for i in row) / 5 for row in chosen)
    found = bootstrap(values, draws=200, seed=3)
    assert found.mean == pytest.approx(0.42)
    assert found.low == pytest.approx(numpy.percentile(means, 2.5))
    assert found.high == pytest.approx(numpy.percentile(means, 97.5))


def test_paired_difference_takes_people_together():
    people = numpy.random.default_rng(0).normal(size=40)
    better = people + 0.1
    found = paired(list(better), list(people))
    assert found.mean == pytest.approx(0.1) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    apart = bootstrap(list(better)).high - bootstrap(list(better)).low
    assert apart > 0.3


def test_ratio_of_means_and_one_person_has_no_interval():
    found = ratio([2.0, 4.0], [1.0, 2.0])
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)
    alone = bootstrap([0.3])
    assert alone.mean == pytest.approx(0.3) and alone.low is None and alone.high is None


# ---- regressions -----------------------------------------------------------------------------------------------------


def test_ridge_is_penalised_least_squares():
    x, z, strength = numbers(30, 4, seed=1) * 3 + 2, numbers(30, 2, seed=2), 0.3
    wide = (x - x.mean(0)) / x.std(0, unbiased=False)
    rows = torch.cat([wide, math.sqrt(strength * 30) * torch.eye(4)])  # the penalty as further rows
    targets = torch.cat([z - z.mean(0), torch.zeros(4, 2)])
    weights = torch.linalg.lstsq(rows.double(), targets.double()).solution.float()
    fresh = numbers(5, 4, seed=3)
    expected = (fresh - x.mean(0)) / x.std(0, unbiased=False) @ weights + z.mean(0)
    torch.testing.assert_close(regression.ridge(x, z, strength)(fresh), expected, atol=1e-5, rtol=1e-4)


def test_strength_follows_what_is_left_to_learn():
    owners = [number // 2 for number in range(200)]
    x = numbers(200, 6, seed=1)
    linear, noise = x @ numbers(6, 3, seed=2), numbers(200, 3, seed=4)
    assert regression.choose_strength(x, linear, owners) == regression.STRENGTHS[0]
    assert regression.choose_strength(x, noise, owners) >= 0.1
    assert regression.stretch(x, linear, owners, regression.STRENGTHS[0]) == pytest.approx(1, abs=1e-3)
    assert regression.stretch(x, linear + 3 * noise, owners, 0.1) > 1.2


def test_components_that_features_do_not_tell_are_dropped():
    x = numbers(300, 5, seed=1)
    targets = torch.cat([x @ numbers(5, 2, seed=2), numbers(300, 6, seed=3)], 1)
    assert regression.choose_components(x, targets, list(range(300))) == 2


def test_people_left_out_are_whole_people():
    owners = [number // 3 for number in range(30)]
    away = regression.left_out(owners).tolist()
    assert {owner for owner, out in zip(owners, away, strict=True) if out} == {4, 9}
    assert sum(away) == 6
    assert regression.left_out([0, 0, 1]).tolist() == [False, False, True]
    assert not regression.left_out([0, 0]).any()


def test_principal_components_are_those_of_svd():
    rows = numbers(6, 20, seed=5) * torch.linspace(1, 3, 20)
    rows = rows - rows.mean(0)
    basis, coordinates = regression.principal_components(rows)
    assert basis.shape == (5, 20)
    torch.testing.assert_close(coordinates @ basis, rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(coordinates.norm(dim=0), torch.linalg.svdvals(rows)[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), atol=1e-5, rtol=0)


# ---- distances -------------------------------------------------------------------------------------------------------


def dense(row, own):
    return {
        b.key: b.scale * row[b.columns].reshape(b.shape) @ row[a.columns].reshape(a.shape)
        for a, b in own.factor_pairs()
    }


def test_distances_between_ranks_are_those_of_dense_deltas():
    one, three = layout("lora", r=1), layout("lora", r=3, alpha=6)
    first, second = numbers(4, one.size, seed=1), numbers(5, three.size, seed=2)
    assert comparable(one, three) and not comparable(one, layout("svfit", r=3))
    found = distances(first, one, second, three)
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            mine, theirs = dense(left, one), dense(right, three)
            wanted = math.sqrt(sum(float((mine[key] - theirs[key]).square().sum()) for key in mine))
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-4)
    wanted = [sum(float(part.square().sum()) for part in dense(row, three).values()) for row in second]
    assert squares(second, three).tolist() == pytest.approx(wanted, rel=1e-4)


def test_entries_are_those_of_dense_deltas_whatever_the_rank():
    one, three = layout("lora", r=1), layout("lora", r=3, alpha=6)
    first, second = numbers(4, one.size, seed=1), numbers(2, three.size, seed=2)
    every = [torch.cat([part.flatten() for part in dense(row, three).values()]) for row in second]
    found = entries(second, three, 12)
    assert all(float((every[i] - value).abs().min()) < 1e-5 for i in range(2) for value in found[i])
    wide = torch.zeros(4, three.size)  # the same products with two more ranks of nothing
    for (a, b), (wide_a, wide_b) in zip(one.factor_pairs(), three.factor_pairs(), strict=True):
        wide[:, wide_a.columns] = torch.nn.functional.pad(first[:, a.columns], (0, 2 * a.shape[1]))
        left = first[:, b.columns].reshape(4, -1, 1) / three.entries[0].scale
        wide[:, wide_b.columns] = torch.nn.functional.pad(left, (0, 2)).flatten(1)
    torch.testing.assert_close(entries(wide, three, 12), entries(first, one, 12), atol=1e-6, rtol=1e-5)


def test_delta_components_are_those_of_dense_deltas():
    own, other = layout("lora", r=1), layout("lora", r=3)
    rows, fresh = numbers(9, own.size, seed=1), numbers(4, other.size, seed=2)
    flat = [
        torch.stack([torch.cat([part.flatten() for part in dense(row, lay).values()]) for row in block]).double()
        for block, lay in ((rows, own), (fresh, other))
    ]
    centre = flat[0].mean(0)
    _, s, vh = torch.linalg.svd(flat[0] - centre, full_matrices=False)
    wanted = [(block - centre) @ vh[:3].T / s[:3] * 3 for block in flat]  # sqrt(9) people
    components = DeltaComponents(rows, own, 3)
    for block, lay, right in ((rows, own, wanted[0]), (fresh, other, wanted[1])):
        found = components.whitened(block, lay)
        torch.testing.assert_close(torch.cdist(found, found), torch.cdist(right, right), atol=1e-4, rtol=1e-4)
    assert components.whitened(rows, own).std(0, unbiased=False).tolist() == pytest.approx([1, 1, 1], abs=1e-4)


def test_distances_do_not_see_how_factors_are_mixed():
    own = layout("lora", r=2)
    row = numbers(1, own.size, seed=1)
    mixed, mix = row.clone(), torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    for a, b in own.factor_pairs():
        mixed[:, a.columns] = (mix.inverse() @ row[0, a.columns].reshape(a.shape)).flatten()
        mixed[:, b.columns] = (row[0, b.columns].reshape(b.shape) @ mix).flatten()
    assert float(distances(row, own, mixed, own)) == pytest.approx(0, abs=1e-3)
    assert float((row - mixed).norm()) > 1


def test_families_without_factors_are_compared_by_their_rows():
    own = layout("svfit", r=4)
    first, second = numbers(3, own.size, seed=1), numbers(2, own.size, seed=2)
    torch.testing.assert_close(
        distances(first, own, second, own).float(), torch.cdist(first, second), atol=1e-5, rtol=1e-4
    )


def test_nearest_passes_over_oneself_and_a_copy_is_seen():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    among = torch.cdist(points, points)
    assert nearest(among, 2, own=True)[1].tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert spread(among, own=True).nearest[1] == pytest.approx(1.5)
    copies = spread(torch.cdist(points[:2] + 1e-6, points))
    assert max(copies.nearest) < 1e-5 and max(copies.ratio) < 1e-5
    assert copies.count == 2


# ---- scores and the table --------------------------------------------------------------------------------------------


def line(contender, person, identity, **more):
    return Score(contender, key_of(contender), person, identity, **more)


@pytest.fixture
def report(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    scores = {
        REAL: [line(REAL, "a", 1.0), line(REAL, "b", 0.9)],
        BASE: [line(BASE, name, 0.0, caption=0.9, moved=0.0) for name in "ab"],
        PERSONAL: [line(PERSONAL, name, 0.4, caption=0.8, moved=0.1) for name in "ab"],
        "DiffLoRA (x)": [
            line("DiffLoRA (x)", name, 0.5, caption=0.85, moved=0.1, numbers=10, bytes=99) for name in "ab"
        ],
    }
    shown = {name: [picture, picture] for name in scores}
    return Report(tmp_path, EvaluateConfig(), "a judge", "DiffLoRA (x)", scores, shown)


def test_table_pairs_with_the_first_generator(report):
    lines = {found.name: found for found in report.lines()}
    assert lines[PERSONAL].ahead.mean == pytest.approx(0.1)
    assert lines["DiffLoRA (x)"].ahead is None and lines["DiffLoRA (x)"].share.mean == pytest.approx(1.25)
    assert lines["DiffLoRA (x)"].caption.mean == pytest.approx(-5)
    assert lines[REAL].caption is None and lines[REAL].moved is None
    told = as_json(report)
    assert told["contenders"][3]["identity"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    text = re.sub(" +", " ", as_markdown(report))
    assert "| DiffLoRA (x) | 0.500 [0.500, 0.500] | - | 1.25 [1.25, 1.25] | -5.0 [-5.0, -5.0] |" in text


def test_scores_come_back_under_their_key_alone(tmp_path):
    picture = Image.new("RGB", (8, 8), "blue")
    made = [line("ridge", "a", 0.25, neighbour="c", neighbour_identity=0.5), line("ridge", "b", 0.5, caption=0.75)]
    Scores(tmp_path).add(made, [picture, picture])
    again = Scores(tmp_path)
    assert again.has(key_of("ridge")) and not again.has(key_of("ridge", 2))
    assert again.lines[key_of("ridge")] == made
    assert [image.tobytes() for image in again.shown(key_of("ridge"))] == [picture.tobytes()] * 2
    again.picture(key_of("ridge")).unlink()
    assert not again.has(key_of("ridge"))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(DataError, match=r"scores\.parquet"):
        Scores(tmp_path)


def test_like_neighbour_counts_people():
    lines = [line("x", "a", 0.5, neighbour_identity=0.6), line("x", "b", 0.5, neighbour_identity=0.4)]
    assert like_neighbour(lines).mean == 0.5


def test_difference_is_a_share_of_the_range():
    black, white = Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), "white")
    assert difference([black, black], [black, white]) == 0.5
    assert difference([], []) is None


@pytest.mark.parametrize("wrong", [{"people": 0}, {"seeds": 0}, {"noise": -1.0}, {"personalize_photos": -1}])
def test_settings_without_meaning(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EvaluateConfig(**wrong)
    with pytest.raises(ConfigError, match="scenes"):
        Drawing(scenes=0)
