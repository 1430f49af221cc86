"""Published counts, written down a second time from the papers: what agrees, what disagrees and by what."""

import re

import pytest

from benchmarks.counts import PAGE, ROWS, figures, judge, page, printed

AGREES = "agrees"

# (paper, model, config) -> count of the paper; the printed figure rounds to it.
AGREEING = {
    ("tlora", "sd15", "LoRA r4"): 797_184,
    ("tlora", "sd15", "DoRA r4"): 897_024,
    ("tlora", "sd15", "OFT 32 blocks, output side"): 1_498_880,
    ("tlora", "sd15", "TLoRA*(2,4)"): 144_256 + 797_184,
    ("tlora", "sd15", "TLoRA(2,6)"): 144_256 + 256_032,
    ("tlora", "sdxl", "TLoRA(1,2)"): 245_520 + 151_200,
    ("tlora", "sdxl", "TLoRA(1,2) of LoRA r1"): pytest.approx(27.331, abs=1e-3),
    ("loldu", "roberta-base", "LoLDU r768"): 18_432,
    **{("loldu", "vit-base", f"LoLDU r{r}"): 24 * r for r in (1, 8, 16, 32, 64, 128, 256, 512)},
    ("loldu", "llama2-7b", "LoLDU r256"): 16_384,
    ("loldu", "roberta-base", "LoRA r8"): 294_912,
    ("loldu", "roberta-base", "VeRA r1024"): 43_008,
    ("loldu", "llama2-7b", "LoRA r64"): 33_554_432,
    ("loldu", "llama2-7b", "MELoRA = LoRA r1"): 524_288,
    ("loldu", "vit-base", "FourierFT n3000"): 72_000,
    ("svfit", "roberta-base", "LoRA r8 to SVFit full"): 16.0,
    ("svfit", "roberta-large", "LoRA r8 to SVFit full"): 16.0,
    ("svfit", "vit-large", "SVFT-Plain"): 49_152,
    ("svfit", "deberta-v3-base", "SVFT-Plain, 6 linears"): 55_296,
    ("svfit", "gemma-2b", "SVFT-Plain, 7 linears"): 193_536,
    ("svfit", "gemma-7b", "SVFT-Plain, 5 linears"): 430_080,
    ("svfit", "roberta-large", "size called ViT's"): 354_310_144,
    ("difflora", "sdxl", "LoKr 4, both decomposed, 280 alphas"): 155_160,
    ("difflora", "sdxl", "LoRA r8"): 11_612_160,
    ("difflora", "sd15", "LoRA r1, to_q to_v"): 99_648,
}
# The same, where one more number a matrix is needed: count of the paper -> printed.
AGREEING_WITH_ONE_MORE = {
    ("loldu", "vit-base", "LoLDU r768"): (18_432, 18_456),
    ("svfit", "vit-base", "SVFT-Plain"): (18_432, 18_500),
}
# Count of the paper -> printed: these differ, and the page must say so.
DISAGREEING = {
    ("tlora", "sd15", "OFT 32 blocks, input side"): (1_406_784, 1_500_000),
    ("tlora", "sd15", "BOFT(2,2)"): (497_664, 2_410_000),
    ("tlora", "sd15", "BOFT(4,8)"): (3_282_432, 20_760_000),
    ("loldu", "llama2-7b", "LoLDU r1024"): (65_536, 16_000),
    ("loldu", "vit-base", "FourierFT n10000"): (240_000, 239_000),
    ("loldu", "vit-base", "LoRA r16"): (589_824, 581_000),
    ("loldu", "roberta-base", "PiSSA = LoRA r19"): (700_416, 707_000),
    ("loldu", "llama2-7b", "LoRA r64 to LoLDU r1024"): (512.0, 2600),
    ("loldu", "roberta-base", "LoRA r8 to LoLDU r768"): (16.0, 2600),
    ("loldu", "vit-base", "LoRA r16, share"): (pytest.approx(0.687, abs=1e-3), 6.77),
    ("loldu", "vit-base", "FourierFT n10000, share"): (pytest.approx(0.280, abs=1e-3), 2.79),
    ("loldu", "vit-base", "LoLDU r768, share"): (pytest.approx(0.0215, abs=1e-4), 0.21),
    ("svfit", "gemma-7b", "SVFT-Plain, 7 linears"): (602_112, 430_000),
    ("svfit", "llama3-8b", "SVFT-Plain, 7 linears"): (720_896, 480_000),
    ("svfit", "llama3-8b", "SVFT-Plain, 5 linears"): (458_752, 480_000),
    ("svfit", "vit-large", "size called ViT's"): (303_301_632, 354_000_000),
}
# Counts of the papers without a printed figure.
NOT_PRINTED = {
    ("tlora", "sdxl", "LoRA r1"): 1_451_520,
    ("tlora", "sdxl", "TLoRA*(1,1)"): 1_697_040,
    ("tlora", "sdxl", "TLoRA(1,4)"): 850_320,
    ("tlora", "sdxl", "TLoRA(2,6)"): 2_342_880,
    ("loldu", "sd15", "LoLDU r32"): 4_096,
    ("loldu", "sd15", "LoLDU full"): 93_696,
    ("loldu", "sdxl", "LoLDU r32"): 17_920,
    ("loldu", "sdxl", "LoLDU full"): 665_600,
    ("svfit", "roberta-base", "SVFit full"): 18_432,
    ("svfit", "roberta-base", "LoRA r8"): 294_912,
    ("svfit", "roberta-large", "SVFit full"): 49_152,
    ("svfit", "roberta-large", "LoRA r8"): 786_432,
    ("svfit", "llama2-7b", "SVFit full"): 262_144,
    ("svfit", "llama2-7b", "LoRA r8"): 4_194_304,
    ("svfit", "llama2-7b", "LoRA r8 to SVFit full"): 16.0,
    ("svfit", "sd15", "SVFit r32"): 4_096,
    ("svfit", "sd15", "SVFit full"): 93_696,
    ("svfit", "sd15", "LoRA r8"): 1_594_368,
    ("svfit", "sd15", "LoRA r8 to SVFit full"): pytest.approx(17.0, abs=0.05),
    ("svfit", "sdxl", "SVFit r32"): 17_920,
    ("svfit", "sdxl", "SVFit full"): 665_600,
    ("svfit", "sdxl", "LoRA r8"): 11_612_160,
    ("svfit", "sdxl", "LoRA r8 to SVFit full"): pytest.approx(17.4, abs=0.05),
    ("difflora", "sdxl", "LoKr 4, first full, 280 alphas"): 349_080,
    ("difflora", "sdxl", "LoRA r1"): 1_451_520,
    ("difflora", "sdxl", "LoRA r4"): 5_806_080,
}
BY_KEY = {(row.paper, row.count.model, row.label): row for row in ROWS}


@pytest.mark.parametrize("key", AGREEING, ids=" ".join)
def test_agrees(key):
    result = judge(BY_KEY[key])
    assert result.count == AGREEING[key] and result.verdict == AGREES


@pytest.mark.parametrize("key", AGREEING_WITH_ONE_MORE, ids=" ".join)
def test_agrees_with_one_more_number_a_matrix(key):
    result = judge(BY_KEY[key])
    assert (result.count, result.published) == AGREEING_WITH_ONE_MORE[key]
    assert result.verdict.startswith("agrees with a trained") and abs(result.count + 24 - result.published) < 50


@pytest.mark.parametrize("key", DISAGREEING, ids=" ".join)
def test_disagrees_with_both_numbers(key):
    result = judge(BY_KEY[key])
    assert (result.count, result.published) == DISAGREEING[key]
    assert result.verdict == "DISAGREES" and result.row.reason


@pytest.mark.parametrize("key", NOT_PRINTED, ids=" ".join)
def test_not_printed(key):
    result = judge(BY_KEY[key])
    assert result.count == NOT_PRINTED[key] and result.verdict == "not printed"


def test_every_row_is_asserted_once():
    asserted = [*AGREEING, *AGREEING_WITH_ONE_MORE, *DISAGREEING, *NOT_PRINTED]
    assert len(asserted) == len(set(asserted)) == len(ROWS) and set(asserted) == set(BY_KEY)


def test_the_page_and_the_figures_are_those_of_the_rows():
    results = [judge(row) for row in ROWS]
    assert PAGE.read_text() == page(results), "redo with: python -m benchmarks.counts"
    told = figures(results)
    assert len(told) == sum(1 if row.published is None else 3 for row in ROWS)  # no two rows share a name
    assert sum(value == 0 for name, value in told.items() if name.endswith(".agrees")) == len(DISAGREEING)
    assert len(re.findall(r"DISAGREES", page(results))) == len(DISAGREEING)


def test_printed_figures_are_read_with_their_rounding():
    assert printed("0.80 M") == (800_000, pytest.approx(5_000))
    assert printed("18,456") == (18_456, 0.5)
    assert printed("27 %") == (27, 0.5)
    assert printed("18.5 K") == (18_500, pytest.approx(50))
