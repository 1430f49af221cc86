"""Tables as people really have them: read right, counted, or refused with file, row and column."""

import csv
import json

import charset_normalizer
import pytest

from smidgen.errors import DataError
from smidgen.tasks.data import tables
from smidgen.tasks.data.tables import open_table, read_rows, read_splits, structured


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    warnings: list[str] = []
    streamed: list[str] = []
    table = open_table(path, streamed)
    rows = read_rows(path, warnings)
    assert ([*table.read()], table.count, streamed) == (rows, len(rows), warnings), (
        "read row by row it is another table"
    )
    assert table.columns == list(dict.fromkeys(name for row in rows for name in row.values))
    return [row.values for row in rows], warnings


PLAIN = {
    "a.csv": 'text,label\n"yes, ""this""\nis one",x\n\nno,y\n,\n',
    "b.csv": "\ufefftext\r\nhello\r\nthere\r\n",
    "a.tsv": "text\tlabel\nyes, this\tx\nno\ty\n",
    "a.jsonl": '{"text": "yes", "id": [1, 2]}\n\n{"text": null, "label": 1}\n',
    "a.parquet": "",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tables_are_read_row_by_row(tmp_path, monkeypatch, name):
    path = tmp_path / name
    if name == "a.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["yes", "no", "so"], "label": [0, 1, None]}), path, row_group_size=2)
        assert len([*open_table(path).read()]) == len(read_rows(path)) == 3
    else:
        read(path, PLAIN[name])
    monkeypatch.setattr(tables, "read_rows", None)  # which reads them whole
    table = open_table(path)
    rows = table.read()
    assert next(rows).where == f"{name} row 1" and len([*rows]) == table.count - 1 > 0
    assert len([*table.read()]) == table.count, "a second pass"


@pytest.mark.parametrize("content, said", [
    ("file_name;text\np0.png;a portrait, smiling\n", "a semicolon between its fields"),
    ("file_name\ttext\np0.png\ta portrait, smiling\n", "a tab between its fields"),
    ("file_name|text\np0.png|a portrait, smiling\n", "a bar between its fields"),
    ("sep=;\r\nfile_name;text\r\np0.png;a portrait, smiling\r\n", "a semicolon between its fields"),
    ("'file_name','text'\n'p0.png','a portrait, smiling'\n", "single quotes around its fields"),
    ('file_name, text\np0.png, "a portrait, smiling"\n', None),
    ('file_name,text,,\r\np0.png,"a portrait, smiling",,\r\n', None),  # as spreadsheets leave it
    ('file_name,text\rp0.png,"a portrait, smiling"\r', None),
])  # fmt: skip
def test_separators_and_quotes(tmp_path, content, said):
    rows, warnings = read(tmp_path / "metadata.csv", content)
    assert rows == [{"file_name": "p0.png", "text": "a portrait, smiling"}]
    assert warnings == ([f"metadata.csv is read with {said}."] if said else [])


def test_quotes_escaped_by_a_backslash(tmp_path):
    rows, warnings = read(tmp_path / "a.csv", 'text,label\n"say \\"hi, you\\" twice",x\n')
    assert rows == [{"text": 'say "hi, you" twice', "label": "x"}] and "backslash" in warnings[0]


@pytest.mark.parametrize("content, message", [
    ("file_name,text\np0.png,a portrait of a person, smiling, in a red hoodie\n",
     r"a\.csv row 1 \(line 2\) has more fields than the 2 columns.*after column 'text' there is ' smiling'.*quotes"),
    ("text\nhello\nyes, hello\n", r"row 2 \(line 3\) has more fields than the 1 columns"),
    ('text,label\n"a\nb",x\nc,d,y\n', r"row 2 \(line 4\) has more fields.*after column 'label' there is 'y'"),
    ("text,label,label\na,0,1\n", r"a\.csv has the column 'label' 2 times \(columns 2, 3\)"),
    ("text,label, text \na,0,b\n", r"has the column 'text' 2 times \(columns 1, 3\)"),
    ('text,label\n"cut off,x\n', r"a\.csv line .* is not CSV.*unexpected end"),
    (b"PK\x03\x04" + b"\0" * 40, "is a zip archive or an Excel workbook, not text"),
    (bytes(range(256)) * 9, "is not UTF-8 text, nor in any encoding that can be guessed"),
])  # fmt: skip
def test_tables_that_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", content)


def test_columns_that_other_formats_name_twice(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl line 2 .*'label' twice"):
        read(tmp_path / "a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 0, "label": 1}\n')
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table([pa.array(["a"]), pa.array([0]), pa.array([1])], ["text", "label", "label"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"a\.parquet has the column 'label' 2 times"):
        read_rows(tmp_path / "a.parquet")


def test_short_rows_are_counted(tmp_path):
    rows, warnings = read(tmp_path / "a.csv", "text,label,note\na,1,x\nb\nc,2\n")
    assert rows[1] == {"text": "b", "label": None, "note": None}
    assert warnings == ["a.csv: 2 rows have fewer fields than columns, and the rest of it is empty: row 2, 3."]


def test_a_cell_longer_than_the_csv_module_allows(tmp_path):
    limit = csv.field_size_limit()
    rows, _ = read(tmp_path / "a.csv", f"text,label\n{'long ' * 100_000},1\n")
    assert len(rows[0]["text"]) == 500_000 and csv.field_size_limit() == limit


WRITTEN = {"text": ['He said "hi"', "tab\there", "line\nend", "plain", "a, b"], "label": list("abcde")}


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_tabs_as_a_writer_quotes_them(tmp_path, quoting, ending):
    """pandas writes TSV by the csv module: these are its bytes."""
    with open(tmp_path / f"a.{ending}", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writerows([list(WRITTEN), *zip(*WRITTEN.values(), strict=True)])
    rows = [row.values for row in read_rows(tmp_path / f"a.{ending}")]
    assert {name: [row[name] for row in rows] for name in WRITTEN} == WRITTEN


@pytest.mark.parametrize(
    "text", ['"Wait," he said, "now".', '"All of it in quotes"', '"never closed', 'in "the" middle']
)
def test_tabs_where_quotes_are_letters(tmp_path, text):
    """As GLUE's files are."""
    rows, _ = read(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\nplain\t0\n")
    assert rows == [{"text": text, "label": "1"}, {"text": "plain", "label": "0"}]


LETTERS = "text,label\nC'était très bien à l'été – “5 €”,good\n"


@pytest.mark.parametrize("encoding, guess", [
    ("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-32", None),
    ("cp1252", "cp1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_encodings(tmp_path, encoding, guess, ending):
    wanted = {"text": "C'était très bien à l'été – “5 €”", "label": "good"}
    content = LETTERS if ending == "csv" else json.dumps(wanted, ensure_ascii=False) + "\n"
    rows, warnings = read(tmp_path / f"a.{ending}", content.encode(encoding))
    assert rows == [wanted]
    assert warnings == (
        [f"a.{ending} is not UTF-8; it is read as {guess}, a guess. Save it as UTF-8 to be sure."] if guess else []
    )


@pytest.mark.parametrize("text, encoding", [
    ("Очень хороший фильм", "cp1251"), ("这部电影非常好看，太无聊了不推荐", "gb18030"), ("とても良い映画でした", "cp932"),
])  # fmt: skip
def test_encodings_of_other_scripts(tmp_path, text, encoding):
    if charset_normalizer.__version__ < "3.1" and encoding == "gb18030":
        pytest.skip("charset-normalizer 3.0 takes this for Korean")
    rows, warnings = read(tmp_path / "a.csv", f"text,label\n{text},x\nok,y\n".encode(encoding))
    assert rows[0]["text"] == text and f"read as {encoding}, a guess" in warnings[0]


def test_what_is_no_character_is_read_as_a_replacement_and_counted(tmp_path):
    said = "1 cell with half a character, a broken byte or a NUL, read as U+FFFD: {} row 2 column 'text'."
    rows, warnings = read(tmp_path / "a.jsonl", '{"text": "whole \\ud83d\\ude00"}\n{"text": "cut emoji \\ud83d"}')
    assert [row["text"] for row in rows] == ["whole 😀", "cut emoji \ufffd"] and warnings == [said.format("a.jsonl")]
    rows, warnings = read(tmp_path / "a.csv", "text,label\nété là,x\n".encode() + b"cut \xc3,y\n")
    assert rows[1]["text"] == "cut \ufffd" and warnings == [said.format("a.csv")]  # most is UTF-8: no guess
    rows, warnings = read(tmp_path / "a.csv", "text,label\na,x\nb\0c,y\n")
    assert rows[1]["text"] == "b\ufffdc" and warnings == [said.format("a.csv")]
    rows, warnings = read(tmp_path / "b.jsonl", '{"m": [{"content": "a"}]}\n{"m": [{"content": "\\ude00"}]}\n')
    assert rows[1]["m"][0]["content"] == "\ufffd" and "b.jsonl row 2 column 'm'" in warnings[0]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("content", [
    '{"text": "a\u2028b"}\n{"text": "c"}\n',
    '{"text": "a\u2028b"}\r\n\r\n{"text": "c"}\r\n',
    '{"text": "a\u2028b"}\r{"text": "c"}',
    '[{"text": "a\u2028b"},\n{"text": "c"}]',
    '{\n "text": "a\u2028b"\n}\n{\n "text": "c"\n}',
    '{"version": 1, "data": [{"text": "a\u2028b"}, {"text": "c"}]}',
    '{"text": {"0": "a\u2028b", "1": "c"}}',
    '{"columns": ["text"], "index": [0, 1], "data": [["a\u2028b"], ["c"]]}',
])  # fmt: skip
def test_json_in_any_layout_under_either_ending(tmp_path, ending, content):
    rows, warnings = read(tmp_path / f"a.{ending}", content)
    assert rows == [{"text": "a\u2028b"}, {"text": "c"}]
    assert warnings == (
        [f"a.{ending}: the rows under 'data' are read; version beside them is not."] if "version" in content else []
    )


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text": "a"}\n{"text": oops}\n', r"a\.jsonl line 2 is not JSON"),
    ("a.jsonl", '{"text": oops}\n{"text": "a"}\n', r"a\.jsonl line 1 is not JSON"),
    ("a.jsonl", '{"text": "a"}\n{"text": "cut', r"a\.jsonl line 2 is not JSON"),
    ("a.json", '[\n {"text": "a"},\n {"text": }\n]', r"a\.json line 3 is not JSON"),
    ("a.jsonl", "[" * 100_000, "nested too deeply"),
    ("a.json", '["a", "b"]', r'row 1 must be an object with named values, not "a"'),
    ("a.jsonl", '{"text": "a"}\n7\n', r"line 2 must be an object with named values, not 7"),
])  # fmt: skip
def test_json_that_is_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"text,label\n", b"\n \n\n"])
def test_empty_files(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv is empty"):
        read_splits(tmp_path / "a.csv")


@pytest.mark.parametrize("cell, value", [
    ('[{"role": "user"}]', [{"role": "user"}]),
    ("['a', \"it's\", None]", ["a", "it's", None]),  # as pandas writes a list
    ("{'a': 1}", {"a": 1}),
    ("['a' 'b']", "['a' 'b']"),  # as NumPy writes it: Python would read ['ab']
    ("[{'role': 'user'}\n {'role': 'user'}]", "[{'role': 'user'}\n {'role': 'user'}]"),
    ("[sic] a text", "[sic] a text"),
    ("[__import__('os').getcwd()]", "[__import__('os').getcwd()]"),
    ("[" * 10_000, "[" * 10_000),
    (7, 7),
])  # fmt: skip
def test_lists_and_objects_in_cells(cell, value):
    assert structured(cell) == value
