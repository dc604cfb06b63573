"""Broken and hostile tables: each is rejected with the number of the bad line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from topwork.data.images.image_validation import Rejection
from topwork.data.sources import open_source, table_reader
from topwork.data.sources.source import find_similar_class_names
from topwork.errors import DataError
from topwork.spec.dataset import DatasetSource

HEAD = "image,label\n"
MALFORMED = [
    ("utf-16", "a.csv", (HEAD + "1.jpg,cat\n").encode("utf-16"), "is not UTF-8 text: .* It looks like UTF-16. Save"),
    ("latin-1", "a.csv", (HEAD + "1.jpg,kätzchen\n").encode("latin-1"), "is not UTF-8 text"),
    ("NUL", "a.csv", HEAD + "1.jpg,c\0at\n", "line 2: a NUL byte"),
    ("missing column", "a.csv", "file,label\n1.jpg,cat\n", "line 2: no column image. The columns are file, label"),
    ("duplicate column", "a.csv", "image,label,label\n1.jpg,cat,dog\n", "several columns are named label"),
    ("comma in a name", "a.csv", HEAD + "1,a.jpg,cat\n", "line 2: more fields than the 2 columns"),
    ("unclosed quote", "a.csv", HEAD + '"1.jpg,cat\n2.jpg,dog\n', "is not a CSV table: unexpected end of data"),
    ("text after a quote", "a.csv", HEAD + '"1"x.jpg,cat\n', "is not a CSV table: ',' expected after '\"'"),
    ("quote over lines", "a.csv", HEAD + '"1.jpg,cat\n2.jpg",dog\n', "line 3: image contains a line break"),
    ("huge field", "a.csv", HEAD + "x" * 200_000 + ",cat\n", r"field larger than field limit \(131072\)"),
    ("huge line", "a.csv", HEAD + "x" * 2**20 + ",cat\n", "line 2: more than 1048576 characters"),
    ("conflicting classes", "a.csv", HEAD + "1.jpg,cat\n2.jpg,dog\n1.jpg,dog\n", "line 4: 1.jpg has the class 'dog'"),
    ("no rows", "a.csv", HEAD, "has no rows"),
    ("empty file", "a.csv", "", "has no rows"),
    ("truncated JSON", "a.jsonl", '{"image": "1.jpg", "label": "cat"}\n{"image', "line 2: invalid JSON"),
    ("deep JSON", "a.jsonl", "[" * 100_000, "line 1: invalid JSON: maximum recursion depth"),
    ("list as class", "a.jsonl", '{"image": "1.jpg", "label": ["cat"]}', 'line 1: label is \\["cat"\\]. Expected t'),
    ("duplicate key", "a.jsonl", '{"image": "1.jpg", "label": "cat", "label": "dog"}', "invalid JSON: duplicate key"),
    ("endless JSON", "a.jsonl", '{"image": "' + "x" * 2**20, "line 1: more than 1048576 characters"),
    ("huge number", "a.jsonl", '{"image": ' + "1" * 5000 + "}", "line 1: invalid JSON: Exceeds the limit"),
]


def open_table(path: Path):
    workspace = SimpleNamespace(scratch=path.parent, storage=None)
    return open_source(DatasetSource.model_validate({"table": {"uri": str(path)}}), workspace)


@pytest.mark.parametrize(("name", "text", "message"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed_table_is_rejected_with_the_reason_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        open_table(tmp_path / name).class_names()
    assert str(error.value).startswith(("The table ", str(tmp_path / name)))


def test_duplicate_and_incomplete_rows_are_reported(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"one")
    text = HEAD + "1.jpg,cat\n 1.jpg , cat \n,dog\n2.jpg,dog\n1.jpg,cat\n3.jpg\n4.jpg,x,\n"
    (tmp_path / "a.csv").write_text(text)
    source = open_table(tmp_path / "a.csv")
    with capture_logs() as entries:
        assert source.class_names() == ("cat", "dog", "x")
    assert source.splits() == {"train": 7}
    assert [(entry["event"], entry["rows"]) for entry in entries] == [("duplicate rows in table", 2)]
    outcomes = []
    for image in source.images("train"):
        try:
            outcomes.append((image.label, image.read()))
        except Rejection as rejection:
            outcomes.append((image.label, rejection.reason))
    missing = [("dog", "missing"), ("dog", "missing")]
    assert outcomes == [
        ("cat", b"one"),
        ("cat", b"one"),
        *missing,
        ("cat", b"one"),
        (None, "missing"),
        ("x", "missing"),
    ]


def test_find_similar_class_names_ignores_case_and_spaces():
    assert find_similar_class_names(("Cat", "a b", "ab", "bird", "cat", "dog")) == ["Cat, cat", "a b, ab"]
    assert find_similar_class_names(("cat", "dog")) == []


def test_secret_in_an_image_path_is_used_but_not_shown(tmp_path):
    name = "1.jpg?X-Amz-Signature=abcdef0123"
    (tmp_path / name).write_bytes(b"one")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "label": "cat"}))
    (image,) = open_table(tmp_path / "a.jsonl").images("train")
    assert (image.name, image.read()) == ("1.jpg?X-Amz-Signature=***", b"one")


def test_endless_line_is_rejected_early(tmp_path, monkeypatch):
    monkeypatch.setattr(table_reader, "MAX_LINE_LENGTH", 1000)
    (tmp_path / "a.csv").write_bytes(HEAD.encode() + b"x" * 10_000_000)
    with pytest.raises(DataError, match="line 2: more than 1000 characters"):
        open_table(tmp_path / "a.csv").class_names()
