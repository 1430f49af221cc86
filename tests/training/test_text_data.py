"""Tables of labelled texts: every layout is read, every mistake is an error that says what to do or a counted warning."""

import json
from dataclasses import replace

import pytest
import torch

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data import splits
from smidgen.tasks.data.tables import read_rows, read_splits, split_of
from smidgen.tasks.data.text import Columns, read_texts
from smidgen.tasks.instruction import recipe as instruction
from smidgen.tasks.text_classification import recipe as text_classification
from smidgen.training.randomness import GROUPED, examples

ROWS = [(f"a {word} text", label) for word in "abcdefghij" for label in ("bad", "good")]
ROWS = [(f"{text} {number}", label) for number, (text, label) in enumerate(ROWS)]


def table(path, rows=ROWS, columns=("text", "label")):
    lines = [",".join(columns), *(",".join(f'"{value}"' for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, held_out=0.1, most=None, **columns):
    return read_texts(path, Columns(**columns), held_out, most)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_holds_the_same_rows(tmp_path, suffix):
    values = [{"text": 'NA, "null"', "label": "x"}, {"text": "none", "label": "y"}]
    path = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        path.write_text('text,label\n"NA, ""null""",x\nnone,y\n')
    elif suffix == "tsv":
        path.write_text('text\tlabel\nNA, "null"\tx\nnone\ty\n')
    elif suffix == "jsonl":
        jsonl(path, values)
    elif suffix == "json":
        path.write_text(json.dumps(values))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(values), path)
    rows = read_rows(path)
    assert [row.values for row in rows] == values and rows[1].where == f"data.{suffix} row 2"


def test_a_folder_of_splits_and_their_names(tmp_path):
    table(tmp_path / "train.csv")
    table(tmp_path / "dev.csv", ROWS[:4])
    table(tmp_path / "test-00000-of-00002.csv", ROWS[4:6])
    table(tmp_path / "test-00001-of-00002.csv", ROWS[6:7])
    (tmp_path / "README.md").write_text("words")
    assert {split: len(rows) for split, rows in read_splits(tmp_path).items()} == {
        "train": 20, "validation": 4, "test": 3,
    }  # fmt: skip
    assert split_of("validation_mismatched") == "" and split_of("validation_matched") == "validation"
    for name in ("training", "testing", "train2", "test1", "testset", "valset", "trainset_b"):
        assert split_of(name) == {"tr": "train", "te": "test", "va": "validation"}[name[:2]], name
    assert split_of("trainers") == split_of("testament") == ""
    warnings: list[str] = []
    table(tmp_path / "more.csv")
    table(tmp_path / "validation_mismatched.csv")  # MNLI's, of another task: no name without a split
    read_splits(tmp_path, warnings)
    assert len(warnings) == 1 and "1 table left out, with names that begin with no split" in warnings[0]


def test_the_cut_follows_from_the_content_alone(tmp_path):
    one = read(table(tmp_path / "a.csv"))
    other = read(table(tmp_path / "b.csv", ROWS[::-1]))
    for name in splits.NAMES:
        assert {e.text for e in one.splits[name]} == {e.text for e in other.splits[name]}
    assert [len(one.splits[name]) for name in splits.NAMES] == [16, 2, 2]
    assert not one.warnings and one.labels == ("bad", "good")
    more = read(table(tmp_path / "c.csv", [*ROWS, ("one more", "good")]))
    moved = {e.text for e in one.splits["test"]} ^ {e.text for e in more.splits["test"]}
    assert len(moved) <= 2  # a new row moves the border by itself, not everything


def test_doubles_stay_on_one_side_of_the_cut(tmp_path):
    found = read(table(tmp_path / "a.csv", ROWS + ROWS), held_out=0.2)
    texts = [{e.text for e in found.splits[name]} for name in splits.NAMES]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert sum(map(len, found.splits.values())) == 40


def test_fewer_train_examples_are_a_part_of_all(tmp_path):
    whole, part = read(table(tmp_path / "a.csv")), read(tmp_path / "a.csv", most=5)
    assert len(part.splits["train"]) == 5 and part.splits["test"] == whole.splits["test"]
    assert {e.text for e in part.splits["train"]} < {e.text for e in whole.splits["train"]}
    with pytest.raises(ConfigError, match=r"max_train_examples must be at least 1, not 0"):
        read(tmp_path / "a.csv", most=0)


def test_labels_are_numbered_by_value_or_by_name(tmp_path):
    numbers = [{"text": f"t{at}", "label": (10, 9, 2.0)[at % 3]} for at in range(30)]
    assert read(jsonl(tmp_path / "a.jsonl", numbers)).labels == ("2", "9", "10")
    assert read(table(tmp_path / "c.csv", [(f"t{at}", f"{at % 11}.0") for at in range(40)])).labels[-1] == "10"
    found = read(jsonl(tmp_path / "b.jsonl", [{"text": f"t{at}", "label": at % 3 > 0} for at in range(30)]))
    assert found.labels == ("False", "True")


def test_unusable_rows_are_left_out_and_counted(tmp_path):
    rows = [{"text": text, "label": label} for text, label in ROWS]
    rows += [{"text": None, "label": "bad"}, {"text": "  ", "label": "bad"}, {"text": float("nan"), "label": "bad"}]
    rows += [{"text": 7, "label": "bad"}, {"text": ["a"], "label": "bad"}, {"text": "fine", "label": None}]
    found = read(jsonl(tmp_path / "a.jsonl", rows))
    assert sum(map(len, found.splits.values())) == 20
    text = " ".join(found.warnings)
    assert "2 train rows whose text is no text, left out: a.jsonl row 24, a.jsonl row 25." in text
    assert "3 train rows without text, left out: a.jsonl row 21, a.jsonl row 22, a.jsonl row 23." in text
    assert "1 train row without a label, left out: a.jsonl row 26." in text


def test_pairs_need_both_texts(tmp_path):
    rows = [{"one": text, "two": text[::-1], "label": label} for text, label in ROWS]
    found = read(jsonl(tmp_path / "a.jsonl", [*rows, {"one": "x", "two": "", "label": "bad"}]), text="one", pair="two")
    example = found.splits["train"][0]
    assert example.pair == example.text[::-1] and "1 train row without text" in found.warnings[0]


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path):
    table(tmp_path / "train.csv")
    table(tmp_path / "validation.csv", [*ROWS[:2], ("new", "bad")])
    table(tmp_path / "test.csv", [("newer", "good")])
    warning, other = read(tmp_path).warnings
    assert other == "1 label without any example in test, its scores say nothing about it: bad."
    assert "2 validation examples also in the train split; its scores flatter: validation.csv row 1" in warning


def test_texts_with_two_labels_are_counted(tmp_path):
    found = read(table(tmp_path / "a.csv", [*ROWS, ("same", "bad"), ("same", "good")]))
    assert "2 train rows whose text has another label elsewhere" in found.warnings[0]


def test_a_test_split_without_labels_is_cut_from_train(tmp_path):
    rows = [{"text": f"t{at}", "label": at % 2} for at in range(30)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", [{"text": f"h{at}", "label": -1} for at in range(5)])
    found = read(tmp_path)
    assert "hides its labels" in found.warnings[0] and len(found.splits["test"]) == 3


def test_numbers_as_labels(tmp_path):
    rows = [(f"t{at}", at / 4) for at in range(20)]
    found = read(table(tmp_path / "a.csv", rows), regression=True)
    assert found.labels == () and {e.label for e in found.splits["train"]} <= {at / 4 for at in range(20)}
    with pytest.raises(DataError, match=r"are numbers such as 0.25, not classes.*--regression"):
        read(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a.csv row 21 has 'much' in 'label', which is no number"):
        read(table(tmp_path / "a.csv", [*rows, ("x", "much")]), regression=True)


@pytest.mark.parametrize("make, message", [
    (lambda f: f / "nothing.csv", r"There is no data at .*nothing\.csv\."),
    (lambda f: table(f / "a.csv", []), r"a\.csv is empty"),
    (lambda f: table(f / "a.csv", ROWS, ("texts", "label")), "no column 'text'. Did you mean 'texts'.*are texts, label"),
    (lambda f: table(f / "a.csv", ROWS, ("text", "labels")), "no column 'label'. Did you mean 'labels'.*--label-column"),
    (lambda f: table(f / "a.csv", [(t, "one") for t, _ in ROWS]), "Every row of train has the label 'one'"),
    (lambda f: table(f / "a.csv", [(t, t) for t, _ in ROWS * 2]), None),
    (lambda f: table(f / "a.csv", [(f"t{n}", f"l{n}") for n in range(40)]), "40 different values in 40 rows"),
    (lambda f: table(f / "a.csv", [("", "x"), ("", "y")]), "No row of train has both text"),
    (lambda f: table(f / "a.csv", ROWS[:2]), "Nothing is left to train on: 2 example.s. are too few"),
    (lambda f: table(f / "a.csv", ROWS[:2] * 40), "Nothing is left to train on: 80 example.s., of which 2 differ, are too few"),
])  # fmt: skip
def test_mistakes_that_leave_nothing_to_learn(tmp_path, make, message):
    if message is None:
        assert len(read(make(tmp_path)).labels) == 20  # few rows a class are odd, but theirs to have
        return
    with pytest.raises(DataError, match=message):
        read(make(tmp_path))


def test_a_label_that_train_does_not_know(tmp_path):
    table(tmp_path / "train.csv")
    table(tmp_path / "validation.csv", [("x", "godo")])
    with pytest.raises(
        DataError, match=r"validation\.csv row 1 \(validation\) has the label 'godo'.*Did you mean 'good'"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"text,label\nx,y,z\n", "row 1 .line 2. has more fields than the 2 columns"),
    ("a.csv", b'text,label\n"x,y\n', "line .* is not CSV"),
    ("a.csv", bytes(range(128, 256)) * 3, "is not UTF-8 text"),
    ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
    ("a.jsonl", b"[1]\n", r"line 1 must be an object with named values, not \[1\]"),
    ("a.json", b'{"text": "x"}', "must hold a list of objects"),
    ("a.parquet", b"no", "is not a Parquet file"),
])  # fmt: skip
def test_files_that_are_damaged(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_folders_without_tables_or_without_train(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no tables.*It holds: notes\.md"):
        read(tmp_path)
    table(tmp_path / "validation.csv")
    table(tmp_path / "other.csv")
    with pytest.raises(DataError, match=r"no file whose name begins with train; it holds other.csv, validation.csv"):
        read(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, -1.0])
def test_shares_without_meaning(tmp_path, share):
    with pytest.raises(ConfigError, match=r"held_out_share must lie between 0 and 0.5"):
        read(table(tmp_path / "a.csv"), held_out=share)


def test_batches_by_length_share_out_the_same_examples():
    lengths = [int(n) for n in torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))]
    for start in (0, 2 * GROUPED):
        plain = [examples(5, at, 8, 1000) for at in range(start, start + GROUPED)]
        grouped = [examples(5, at, 8, 1000, lengths.__getitem__) for at in range(start, start + GROUPED)]
        assert plain != grouped and sorted(at for batch in plain for at in batch) == sorted(
            at for batch in grouped for at in batch
        )

        def padding(batches):
            return sum(max(lengths[at] for at in batch) - lengths[at] for batch in batches for at in batch)

        assert padding(grouped) < padding(plain) / 10
        longest = [max(lengths[at] for at in batch) for batch in grouped]
        assert longest != sorted(longest)  # in an order of chance, not from short to long


@pytest.mark.parametrize("recipe", [text_classification, instruction], ids=["texts", "chat"])
def test_a_recipe_takes_batches_by_length(recipe, tmp_path):
    config = recipe.PRESETS["debug"]
    texts = [(" ".join(["good"] * (1 + row % 9)) + f" {row}", "ab"[row % 2]) for row in range(60)]
    if recipe is text_classification:
        data = replace(config.data, path=str(table(tmp_path / "texts.csv", texts)))
    else:
        chat = [{"prompt": text, "completion": label} for text, label in texts]
        data = replace(config.data, path=str(jsonl(tmp_path / "chat.jsonl", chat)))

    def padding(by):
        task = recipe.prepare(replace(config, data=replace(data, group_by_length=by))).task
        return sum(int((task.batch(index)["attention_mask"] == 0).sum()) for index in range(GROUPED))

    assert padding(True) < padding(False) / 2
