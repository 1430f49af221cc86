"""Labels by one rule: what is one label, what is none, what is several, and which examples of each are held out."""

import json
from collections import Counter

import pytest

from smidgen.errors import DataError
from smidgen.tasks.data import splits
from smidgen.tasks.data.labels import read_labels
from smidgen.tasks.data.text import Columns, read_texts


def labels(*values, **others):
    cells = {"train": [(value, f"row {number}") for number, value in enumerate(values, 1)]}
    cells |= {split: [(value, f"{split} row 1")] for split, value in others.items()}
    return read_labels(cells, "label")


@pytest.mark.parametrize("values, names, numbers", [
    ([False, "true", 0, True, "false", 1], ("False", "True"), [0, 1, 0, 1, 0, 1]),
    (["true", "1", "FALSE", "0"], ("False", "True"), [1, 1, 0, 0]),
    (["True", "true", "False"], ("False", "True"), [1, 1, 0]),
    ([True, False, 2], ("0", "1", "2"), [1, 0, 2]),
    (["true", "half-true", "false"], ("false", "half-true", "true"), [2, 1, 0]),  # words among words
    ([1, 1.0, "1", " 1 ", "1.00", 0], ("0", "1"), [1, 1, 1, 1, 1, 0]),
    ([10, 9, 2.0, "-1"], ("-1", "2", "9", "10"), [3, 2, 1, 0]),
    ([" cat", "cat", "dog\u200b", "dog"], ("cat", "dog"), [0, 0, 1, 1]),
    (["caf\u00e9", "cafe\u0301", "tea"], ("caf\u00e9", "tea"), [0, 0, 1]),  # composed and decomposed
])  # fmt: skip
def test_one_label_however_it_is_written(values, names, numbers):
    found = labels(*values)
    assert found.names == names and found.values["train"] == numbers and not found.several and not found.warnings


@pytest.mark.parametrize("values, names, numbers", [
    ([["x"], ["x", "y"], []], ("x", "y"), [(0,), (0, 1), ()]),
    (['["x"]', "['x', 'y']", "[]"], ("x", "y"), [(0,), (0, 1), ()]),  # as tables hold them
    ([[3, 1], [1.0], ["3"]], ("1", "3"), [(0, 1), (0,), (1,)]),
    ([["y", "y", " x"], "y"], ("x", "y"), [(0, 1), (1,)]),
    ([[0, 1], [1, 0], [1, 1]], ("0", "1"), [(1,), (0,), (0, 1)]),  # ones where a class holds
    ([[False, True, False], [True, True, False]], ("0", "1", "2"), [(1,), (0, 1)]),
    ([{"toxic": 1, "rude": 0}, {"toxic": True, "rude": True}], ("rude", "toxic"), [(1,), (0, 1)]),
])  # fmt: skip
def test_lists_make_the_task_multi_label(values, names, numbers):
    found = labels(*values)
    assert found.several and found.names == names and found.values["train"] == numbers


@pytest.mark.parametrize("values, message", [
    ([["x"], ["y", None]], "row 2 has None among its labels in 'label'"),
    ([["x"], [["y"]]], r"row 2 has \['y'\] among its labels"),
    ([{"x": 1}, {"x": 0.5}], "row 2 has 0.5 in .*holds 0 and 1"),
    ([["x", "y"], ["x", "y"]], "Every row of train has the label 'x\\+y'"),
    ([[], []], "Every row of train has no label"),
    (["x", "x"], "Every row of train has the label 'x' in 'label': there is nothing to learn"),
    ([0.5, 1, 2], "are numbers such as 0.5, not classes"),
])  # fmt: skip
def test_labels_that_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        labels(*values)


def test_a_label_that_train_lacks_is_named_with_its_row():
    with pytest.raises(DataError, match=r"test row 1 \(test\) has the label 'z', which train has not"):
        labels(["x"], ["y"], test=["x", "z"])


def test_spellings_and_words_for_nothing_are_warned_about():
    (warning,) = labels("Good", "good", "bad", "Good").warnings
    assert warning == (
        "Labels that differ in case, spacing or leading zeros alone are classes of their own: 'Good' (2), 'good' (1). Spell them alike if "
        "they mean the same."
    )
    assert "'semi-final' (1), 'semi_final' (1)" in labels("semi-final", "semi_final", "x").warnings[0]
    assert "'01' (1), '1' (1)" in labels("01", "1", "2").warnings[0]
    (warning,) = labels(["x"], ["x", "y"]).warnings
    assert warning == "1 label that every example of train has: nothing is learnt of it: x."
    assert not labels(-1, 1, 11).warnings and not labels("c", "c++", "c#").warnings
    (warning,) = labels("None", "x").warnings
    assert warning.startswith("The label 'None' (1) is a class of its own")
    (warning,) = labels([0, 1], [1, 0]).warnings
    assert warning.startswith("Every example of train has one label alone, in a list")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_of_zeros_and_ones_are_labels_together(tmp_path):
    lines = [f"t{n},{n % 2},{int(n % 3 == 0)},0" for n in range(30)] + ["x,,,"]
    (tmp_path / "a.csv").write_text("text,toxic,rude,odd\n" + "\n".join(lines))
    found = read_texts(tmp_path / "a.csv", Columns(label="toxic, rude,odd"), 0.1)
    assert found.several and found.labels == ("odd", "rude", "toxic")
    assert {e.label for e in found.splits["train"]} == {(), (1,), (2,), (1, 2)}
    assert found.warnings[0] == "1 train row without a label, left out: a.csv row 31."
    assert "1 label without any example in train, nothing is learnt of it: odd." in found.warnings
    with pytest.raises(DataError, match=r"no column 'rued'\. Did you mean 'rude'"):
        read_texts(tmp_path / "a.csv", Columns(label="toxic,rued"), 0.1)


@pytest.mark.parametrize("nothing", [None, float("nan"), "", "  ", "nan", "null", "<NA>"])
def test_rows_without_a_label_are_counted(tmp_path, nothing):
    rows = [{"text": f"t{n}", "label": ("cat", "dog")[n % 2]} for n in range(30)] + [{"text": "x", "label": nothing}]
    found = read_texts(jsonl(tmp_path / "a.jsonl", rows), Columns(), 0.1)
    assert found.warnings == ("1 train row without a label, left out: a.jsonl row 31.",) and found.labels == (
        "cat",
        "dog",
    )


# ---- what is held out ------------------------------------------------------------------------------------------------


def test_every_class_is_held_out_by_its_share():
    examples = [(f"text {n}", 0 if n < 360 else 1 if n < 390 else 2) for n in range(400)]
    found = splits.complete({"train": examples}, lambda e: splits.digest(e[0]), 0.1, classes=lambda e: (e[1],))
    counts = {name: Counter(label for _, label in some) for name, some in found.items()}
    assert counts["test"] == {0: 36, 1: 3, 2: 1} and counts["validation"] == {0: 36, 1: 3, 2: 1}
    part = splits.complete({"train": examples}, lambda e: splits.digest(e[0]), 0.1, 32, lambda e: (e[1],))["train"]
    assert len(part) == 32 and Counter(label for _, label in part) == {0: 29, 1: 2, 2: 1}


def test_a_class_of_five_is_in_every_split_and_copies_stay_together():
    examples = [(f"text {n % 95}", int(n % 95 >= 90)) for n in range(190)]
    found = splits.complete({"train": examples}, lambda e: splits.digest(e[0]), 0.1, classes=lambda e: (e[1],))
    assert all({label for _, label in some} == {0, 1} for some in found.values())
    texts = [{text for text, _ in some} for some in found.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_several_labels_are_held_out_by_their_shares():
    examples = [(f"text {n}", (0,) if n % 10 else (0, 1, 2) if n % 20 else (2,)) for n in range(200)]
    found = splits.complete({"train": examples}, lambda e: splits.digest(e[0]), 0.1, classes=lambda e: e[1])
    held = Counter(label for _, some in found["test"] for label in some)
    assert len(found["test"]) == 20 and held[1] == 1 and held[2] == 2 and held[0] in (18, 19)


def test_classes_that_a_split_lacks_are_named(tmp_path):
    rows = [{"text": f"t{n}", "label": "rare" if n < 2 else ("cat", "dog")[n % 2]} for n in range(60)]
    warnings = read_texts(jsonl(tmp_path / "a.jsonl", rows), Columns(), 0.1).warnings
    assert warnings == (
        "1 label without any example in validation, its scores say nothing about it: rare.",
        "1 label without any example in test, its scores say nothing about it: rare.",
    )
