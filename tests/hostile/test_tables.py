"""Tables that are broken or mean harm: each is refused with its line, or told."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from topwork.data.image_validation import Rejection
from topwork.data.sources import open_source, table_reader
from topwork.data.sources.source import lookalikes
from topwork.errors import DataError
from topwork.progress import LineProgress
from topwork.spec.dataset import DatasetSource

HEAD = "image,label\n"
BROKEN = [
    ("utf-16", "a.csv", (HEAD + "1.jpg,cat\n").encode("utf-16"), "is not UTF-8 text: .* It looks like UTF-16. Save"),
    ("latin-1", "a.csv", (HEAD + "1.jpg,kätzchen\n").encode("latin-1"), "is not UTF-8 text"),
    ("NUL", "a.csv", HEAD + "1.jpg,c\0at\n", "line 2: a NUL byte"),
    ("column missing", "a.csv", "file,label\n1.jpg,cat\n", "line 2: no column image. There are file, label"),
    ("column twice", "a.csv", "image,label,label\n1.jpg,cat,dog\n", "several columns are called label"),
    ("comma in a name", "a.csv", HEAD + "1,a.jpg,cat\n", "line 2: more fields than the 2 columns"),
    ("quote never closed", "a.csv", HEAD + '"1.jpg,cat\n2.jpg,dog\n', "is not a CSV table: unexpected end of data"),
    ("text after a quote", "a.csv", HEAD + '"1"x.jpg,cat\n', "is not a CSV table: ',' expected after '\"'"),
    ("quote over lines", "a.csv", HEAD + '"1.jpg,cat\n2.jpg",dog\n', "line 3: image holds a line break"),
    ("huge field", "a.csv", HEAD + "x" * 200_000 + ",cat\n", r"field larger than field limit \(131072\)"),
    ("huge line", "a.csv", HEAD + "x" * 2**20 + ",cat\n", "line 2: more than 1048576 characters"),
    ("two classes", "a.csv", HEAD + "1.jpg,cat\n2.jpg,dog\n1.jpg,dog\n", "line 4: 1.jpg is of the class 'dog' here"),
    ("no row", "a.csv", HEAD, "has no row"),
    ("nothing", "a.csv", "", "has no row"),
    ("cut JSON", "a.jsonl", '{"image": "1.jpg", "label": "cat"}\n{"image', "line 2: not JSON"),
    ("deep JSON", "a.jsonl", "[" * 100_000, "line 1: not JSON: maximum recursion depth"),
    ("list as a class", "a.jsonl", '{"image": "1.jpg", "label": ["cat"]}', 'line 1: label is \\["cat"\\]. Expected a'),
    ("key twice", "a.jsonl", '{"image": "1.jpg", "label": "cat", "label": "dog"}', "not JSON: a key stands twice"),
    ("endless JSON", "a.jsonl", '{"image": "' + "x" * 2**20, "line 1: more than 1048576 characters"),
    ("number that is none", "a.jsonl", '{"image": ' + "1" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
]


def table(path: Path, said: io.StringIO | None = None):
    here = SimpleNamespace(scratch=path.parent, storage=None, progress=LineProgress(said or io.StringIO()))
    return open_source(DatasetSource.model_validate({"table": {"uri": str(path)}}), here)


@pytest.mark.parametrize(("name", "text", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_table_is_refused_with_what_is_wrong_and_where(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as refused:
        table(tmp_path / name).class_names()
    assert str(refused.value).startswith(("The table ", str(tmp_path / name)))


def test_rows_that_are_repeated_or_name_nothing_are_told(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"one")
    text = HEAD + "1.jpg,cat\n 1.jpg , cat \n,dog\n2.jpg,dog\n1.jpg,cat\n3.jpg\n4.jpg,x,\n"
    (tmp_path / "a.csv").write_text(text)
    said = io.StringIO()
    source = table(tmp_path / "a.csv", said)
    assert source.class_names() == ("cat", "dog", "x")
    assert source.splits() == {"train": 7}
    assert "images named by several rows rows=2" in said.getvalue()
    outcomes = []
    for item in source.items("train"):
        try:
            outcomes.append((item.label, item.read()))
        except Rejection as rejection:
            outcomes.append((item.label, rejection.reason))
    missing = [("dog", "missing"), ("dog", "missing")]
    assert outcomes == [
        ("cat", b"one"),
        ("cat", b"one"),
        *missing,
        ("cat", b"one"),
        (None, "missing"),
        ("x", "missing"),
    ]


def test_classes_that_differ_by_case_or_spaces_alone_are_found():
    assert lookalikes(("Cat", "a b", "ab", "bird", "cat", "dog")) == ["Cat, cat", "a b, ab"]
    assert lookalikes(("cat", "dog")) == []


def test_a_name_with_a_secret_is_read_as_it_stands_and_shown_without(tmp_path):
    name = "1.jpg?X-Amz-Signature=abcdef0123"
    (tmp_path / name).write_bytes(b"one")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "label": "cat"}))
    (item,) = table(tmp_path / "a.jsonl").items("train")
    assert (item.name, item.read()) == ("1.jpg?X-Amz-Signature=***", b"one")


def test_a_table_of_one_long_line_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(table_reader, "MAX_LINE", 1000)
    (tmp_path / "a.csv").write_bytes(HEAD.encode() + b"x" * 10_000_000)
    with pytest.raises(DataError, match="line 2: more than 1000 characters"):
        table(tmp_path / "a.csv").class_names()
