"""docs/claims.md is what the generator makes of the results, and its verdicts follow from the figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from docsite import claims
from docsite.claims import Claim, decide, page, read
from smidgen.errors import SmidgenError


def test_the_page_is_what_the_generator_makes() -> None:
    assert claims.PAGE.read_text() == claims.whole(), f"redo it: {claims.COMMAND}"


def test_quotes_are_short_and_every_source_is_linked() -> None:
    papers, found = read()
    assert {claim.paper for claim in found} == set(papers)
    assert max(len(claim.says.split()) for claim in found) <= 25
    assert all((claims.DOCS / claim.page.partition("#")[0]).exists() for claim in found)


@pytest.mark.parametrize("figures, said", [
    ({"ours": 2.0, "ours_interval": [1.9, 2.1], "theirs": 1.0}, "met"),
    ({"ours": 2.0, "ours_interval": [0.9, 2.1], "theirs": 1.0}, "not met"),
    ({"ours": 0.5, "ours_interval": [0.4, 0.6], "theirs": 1.0}, "against"),
])  # fmt: skip
def test_verdicts_follow_from_the_figures(figures: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"figures": figures}))
    one = _claim()
    assert decide(one, tmp_path).verdict == said
    line = page({"us": claims.Paper("Us", "1")}, [one], results=tmp_path).splitlines()[-1]
    assert line.startswith(f'| "better" | {figures["ours"]:.2f} | **{said}** | met: `ours_low > theirs`')


def test_what_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SmidgenError, match=r"needs bench\.json, and there is no benchmark of that name"):
        decide(_claim(), tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({"figures": {"ours": 2.0}}))
    with pytest.raises(SmidgenError, match=r"needs the figure 'theirs', which bench\.json does not hold"):
        decide(_claim(), tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({"figures": {"ours": 2.0, "theirs": 1.0}}))
    with pytest.raises(SmidgenError, match=r"name 'ours_low' is not defined"):
        decide(_claim(), tmp_path)
    with pytest.raises(SmidgenError, match="both hold"):
        decide(_claim(met="ours > theirs", against="ours > 0"), tmp_path)
    with pytest.raises(SmidgenError, match="or untestable alone"):
        _claim(untestable="no network")


def test_a_benchmark_that_has_not_been_run_is_said(tmp_path: Path) -> None:
    one = _claim(figures={"ours": "convergence:ours", "theirs": "convergence:theirs"})
    assert decide(one, tmp_path).verdict == "not measured yet"
    assert "`make bench NAME=convergence`" in page({"us": claims.Paper("Us", "1")}, [one], results=tmp_path)


def test_a_comparison_gives_a_method_less_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "COMPARISONS", tmp_path / "pages")
    one = _claim(figures={"gap": "mood:ours"}, here="{gap:+.2f} to {gap_high:+.2f}", met="gap_low > 0", against="")
    with pytest.raises(SmidgenError, match=r"needs mood\.json"):
        decide(one, tmp_path)
    (tmp_path / "pages").mkdir()
    told = {"method": "ours", "difference": {"mean": 0.02, "low": -0.01, "high": 0.05}}
    (tmp_path / "pages" / "mood.json").write_text(json.dumps({"claims": [told]}))
    assert decide(one, tmp_path).figures == {"gap": 0.02, "gap_low": -0.01, "gap_high": 0.05}
    assert "| +0.02 to +0.05 | **not met** |" in page({"us": claims.Paper("Us", "1")}, [one], results=tmp_path)


def _claim(**changed: Any) -> Claim:
    return Claim(**{
        "paper": "us", "says": "better", "here": "{ours:.2f}", "figures": {"ours": "bench:ours", "theirs": "bench:theirs"},
        "met": "ours_low > theirs", "against": "ours_high < theirs", "page": "claims.md",
    } | changed)  # fmt: skip
