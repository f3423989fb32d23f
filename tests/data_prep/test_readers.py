"""Every kind of file gives the same documents, and what is wrong with one is named by file, line and reason."""

import bz2
import csv
import gzip
import io
import lzma
import sys

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import files
from data_prep.documents import ReadOptions, Rejections, list_parts, read_batches
from data_prep.errors import UserError
from tests.data_prep.test_documents import TEXTS, jsonl, read, read_all, zstd

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


def fields_of(path, **options):
    reading = ReadOptions(fields=True, **options)
    parts = list_parts([str(path)], reading)
    return [f for part in parts for batch in read_batches(part, reading, Rejections(part)) for f in batch.fields]


def as_csv(texts, delimiter=","):
    output = io.StringIO()
    writer = csv.writer(output, delimiter=delimiter)
    writer.writerows([["n", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return output.getvalue().encode()


def write_ipc(path, table, *, stream):
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)


def wet(texts, kind="conversion", content_type="text/plain"):
    records = [record(b"software: test\r\n", "warcinfo", "application/warc-fields")]
    return b"".join(records + [record(text.encode(), kind, content_type, number) for number, text in enumerate(texts)])


def record(content, kind, content_type, number=0):
    return (
        (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: {content_type}\r\n"
            f"WARC-Target-URI: http://example.org/{number}\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode()
        + content
        + b"\r\n\r\n"
    )


def response(body, content_type="text/plain", head="", status="200 OK"):
    raw = body if isinstance(body, bytes) else body.encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{head}\r\n".encode() + raw


# --- the same documents


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    table = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS})
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl(TEXTS)))
        (tmp_path / f"b.json{suffix}").write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))
        (tmp_path / f"a.csv{suffix}").write_bytes(compress(as_csv(TEXTS)))
        (tmp_path / f"a.tsv{suffix}").write_bytes(compress(as_csv(TEXTS, "\t")))
        (tmp_path / f"a.wet{suffix}").write_bytes(compress(wet(TEXTS)))
    (tmp_path / "a.parquet").touch()
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    write_ipc(tmp_path / "file.arrow", table, stream=False)
    write_ipc(tmp_path / "stream.arrow", table, stream=True)
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    names = sorted(tmp_path.iterdir())
    assert len(names) == 5 * 5 + 4
    for path in names:
        assert read_all([path]) == TEXTS, path.name
        assert read_all([path], part_bytes=60, fields=True) == TEXTS, path.name
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_all([f"{tmp_path}/*.txt.gz"]) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=15), data=st.data())
@settings(max_examples=40, deadline=None)
def test_tables_cut_into_any_parts_lose_and_repeat_no_row(kind, texts, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / f"a.{kind}"
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=data.draw(st.integers(1, 5)))
    else:
        write_ipc(path, table, stream=False)
    part_bytes = data.draw(st.integers(1, 2 * path.stat().st_size))
    parts = list_parts([str(path)], ReadOptions(part_bytes=part_bytes))
    assert sum(part.bytes for part in parts) == path.stat().st_size
    found, rejected = read([path], part_bytes=part_bytes)
    assert found == [text for text in texts if text.strip()]
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    assert rejected == [(number, "empty", "empty document") for number in empty]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.csv", "a.tsv.xz", "a.wet"])
def test_an_empty_file_holds_no_documents(tmp_path, name):
    (tmp_path / name).write_bytes(
        b"" if name.endswith(("l", "v", "t", ".gz")) else COMPRESS[name[-4:].lstrip("lv")](b"")
    )
    texts, rejected = read([tmp_path / name])
    assert texts == [] and [category for _, category, _ in rejected] == ["empty"] * name.endswith("txt")


def test_a_byte_order_mark_is_not_part_of_the_first_document(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + jsonl(TEXTS) + mark + jsonl(TEXTS))  # two files put together
    assert read_all([tmp_path / "a.jsonl"]) == TEXTS * 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(mark + jsonl(TEXTS)))
    assert read_all([tmp_path / "a.jsonl.gz"]) == TEXTS
    (tmp_path / "a.csv").write_bytes(mark + b"text\r\nyes\r\n")
    (tmp_path / "a.txt").write_bytes(mark + b"yes")
    assert read_all([tmp_path / "a.csv"]) == read_all([tmp_path / "a.txt"]) == ["yes"]


# --- fields


def test_another_field_can_hold_the_text_also_one_inside_another(tmp_path):
    rows = {"body": ["yes"], "text": [3], "a": [{"b": {"c": "inner"}, "d": 1}]}
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": 3, "a": {"b": {"c": "inner"}, "d": 1}}\n')
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    write_ipc(tmp_path / "a.arrow", pyarrow.table(rows), stream=True)
    for path in sorted(tmp_path.iterdir()):
        for field, text in (("body", "yes"), ("a.b.c", "inner")):
            assert read_all([path], text_field=field) == [text]
        assert fields_of(path, text_field="body") == [{"text": 3, "a": {"b": {"c": "inner"}, "d": 1}}]
        assert fields_of(path, text_field="a.b.c") == [{"body": "yes", "text": 3, "a": {"b": {}, "d": 1}}]


def test_a_name_with_a_dot_is_first_of_all_a_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "outer", "a": {"b": "inner"}}\n')
    pyarrow.parquet.write_table(pyarrow.table({"a.b": ["outer"]}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read_all([path], text_field="a.b") == ["outer"]


def test_fields_of_tables_can_be_written_as_json(tmp_path):
    import datetime
    import decimal

    import orjson

    row = {
        "text": "x",
        "day": datetime.date(2024, 1, 2),
        "raw": b"\xff\x00",
        "price": decimal.Decimal("1.50"),
        "deep": {"raws": [b"a"], "none": None},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (fields,) = fields_of(tmp_path / "a.parquet")
    assert orjson.loads(orjson.dumps(fields)) == {
        "day": "2024-01-02",
        "raw": "/wA=",
        "price": "1.50",
        "deep": {"raws": ["YQ=="], "none": None},
    }


def test_not_a_number_is_read_as_python_writes_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN, "big": Infinity}\n')
    assert read_all([tmp_path / "a.jsonl"]) == ["x"]


def test_texts_in_dictionary_and_binary_columns_are_texts(tmp_path):
    for number, kind in enumerate([pyarrow.binary(), pyarrow.large_string(), pyarrow.string_view()]):
        write_ipc(tmp_path / f"{number}.arrow", pyarrow.table({"text": pyarrow.array(["é"] * 3, kind)}), stream=False)
    encoded = pyarrow.array(["é"] * 3).dictionary_encode()
    write_ipc(tmp_path / "d.arrow", pyarrow.table({"text": encoded}), stream=True)
    for path in sorted(tmp_path.iterdir()):
        assert read_all([path]) == ["é"] * 3, path.name


# --- bad lines

BAD_LINES = {
    b'{"text": "unfinished': r"not JSON (Unterminated string starting at at column 10)",
    b'{"body": "x", "id": 1}': "no field 'text' (found: body, id; --text_field names another)",
    b'{"text": 5}': "'text' is not a string",
    b'{"text": null}': "'text' is not a string",
    b'{"text": []}': "'text' is not a string",
    b'["text"]': "a JSON list, not an object",
    b'"text"': "a JSON str, not an object",
    b"7": "a JSON int, not an object",
    b'{"text": "caf\xe9"}': "not UTF-8 at byte 13 of the line",
    rb'{"text": "ab\ud800"}': "holds a lone surrogate, which is no text",
    rb'{"text": "ab", "other": "\udc00"}': "holds a lone surrogate, which is no text",
    b'{"text": "ab\xed\xa0\x80"}': "not UTF-8 at byte 12 of the line",
    b"[" * 100_000: "not JSON of a sane depth or range",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "not JSON of a sane depth or range",
    b'{"text": " \\n"}': "empty document",
    b'{"text": ""}': "empty document",
    b"\x00\x00\x00": "not JSON (Expecting value at column 1)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_line_is_named_by_its_number_and_skipped(tmp_path, line, suffix):
    good = [f"document {i}" for i in range(40)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(good) + line + b"\n" + jsonl(good)))
    texts, rejected = read([path], part_bytes=300)
    if line.startswith(b'{"text": "x", "n": 9'):  # orjson reads so large a number as infinity or refuses it
        texts = [text for text in texts if text != "x"]
        rejected = rejected or [(41, "malformed", BAD_LINES[line])]
    assert texts == good * 2
    assert rejected == [(41, "empty" if "empty" in BAD_LINES[line] else "malformed", BAD_LINES[line])]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_document_that_is_too_long_is_never_held_in_memory(tmp_path, suffix):
    import tracemalloc

    path = tmp_path / f"a.jsonl{suffix}"
    long = b'{"text": "' + b"x" * 30_000_000 + b'"}\n'
    path.write_bytes(COMPRESS[suffix](jsonl(["before"]) + long + jsonl(["after"])))
    tracemalloc.start()
    texts, rejected = read([path], max_document_bytes=100_000, part_bytes=10_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["before", "after"]
    assert rejected == [(2, "too long", f"{len(long):,} bytes, longer than the 100,000 of --max_document_megabytes")]
    assert peak < 15_000_000  # xz keeps its own window of 8 MB


def test_a_document_just_as_long_as_allowed_is_kept(tmp_path):
    line = b'{"text": "' + b"x" * 88 + b'"}'
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
    assert read_all([tmp_path / "a.jsonl"], max_document_bytes=100) == ["x" * 88] * 2
    assert len(read([tmp_path / "a.jsonl"], max_document_bytes=99)[1]) == 2


# --- damaged files


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (suffix, kind)
        for suffix in (".gz", ".zst", ".bz2", ".xz")
        for kind in ("truncated", "damaged", "other")
        if (suffix, kind) != (".zst", "damaged")
    ],  # pyarrow writes no checksums
)
def test_of_a_damaged_compressed_file_what_comes_before_is_kept_and_the_rest_one_rejection(tmp_path, suffix, kind):
    import random

    numbers = random.Random(0)
    good = [f"document {i} " + "".join(numbers.choices("abcdefghij", k=200)) for i in range(6_000)]
    packed = bytearray(COMPRESS[suffix](jsonl(good)))
    if kind == "truncated":
        packed = packed[: len(packed) * 3 // 4]
    elif kind == "damaged":
        packed[len(packed) * 3 // 4] ^= 0xFF
    else:
        packed = bytearray(jsonl(good))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    texts, rejected = read([path])
    *_, (_, category, reason) = rejected
    assert category == "damaged" and "\n" not in reason
    if kind == "damaged":  # a decompressor may give wrong bytes before it finds out
        assert texts[:3_000] == good[:3_000] and texts != good
    else:
        assert texts == good[: len(texts)] and len(texts) >= (3_000 if kind == "truncated" else 0)
        assert [line for line, _, _ in rejected] == [len(texts) + 1]
    assert kind != "truncated" or reason.startswith("truncated: cannot be read from here on")


def test_zeros_after_a_gzip_member_are_padding(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)) + b"\0" * 512)
    assert read_all([tmp_path / "a.jsonl.gz"]) == TEXTS


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.csv", "a.parquet", "a.arrow", "a.wet"]
)
def test_a_read_error_is_no_fault_of_the_data(tmp_path, name, monkeypatch):
    path = tmp_path / name
    table = pyarrow.table({"text": [f"{i} " * 20_000 for i in range(50)]})
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    elif name.endswith("arrow"):
        write_ipc(tmp_path / name, table, stream=True)
    else:
        content = {"csv": as_csv, "wet": wet}.get(name[2:], jsonl)(table.column(0).to_pylist())
        (tmp_path / name).write_bytes(COMPRESS["." + name.split(".")[2] if name.count(".") > 1 else ""](content))
    (part,) = list_parts([str(tmp_path / name)], ReadOptions())
    reads_before_failure = 0

    class FailingDisk(io.FileIO):
        def readinto(self, buffer):
            self.count()
            return super().readinto(buffer)

        def read(self, size=-1):
            self.count()
            return super().read(size)

        def count(self):
            nonlocal reads
            reads += 1
            if reads > reads_before_failure:
                raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.io, "FileIO", FailingDisk)
    while True:  # the first read fails, then the second, ... until none is left to fail
        reads, rejections = 0, Rejections(part)
        try:
            list(read_batches(part, ReadOptions(), rejections))
            break
        except OSError as error:
            assert error.errno == 5 and str(path) in str(error)
        assert rejections.records == []
        reads_before_failure += 1
    assert reads_before_failure >= 2


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", b'{"text": "x"}\n'])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_what_is_no_table_is_one_rejection(tmp_path, kind, content):
    (tmp_path / f"a.{kind}").write_bytes(content)
    texts, ((line, category, reason),) = read([tmp_path / f"a.{kind}"], part_bytes=1)
    assert (texts, line, category) == ([], 1, "damaged") and "\n" not in reason
    assert reason.startswith("not a readable Parquet" if kind == "parquet" else "not a readable Arrow")


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    texts = [f"{i} " + "x" * 500 for i in range(90)]
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 30, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    content = bytearray(path.read_bytes())
    content[content.index(b"45 xxx") + 10] = ord("y")
    path.write_bytes(content)
    (part,) = list_parts([str(path)], ReadOptions())
    rejections = Rejections(part)
    found = [text for batch in read_batches(part, ReadOptions(), rejections) for text in batch.texts]
    assert found == texts[:30] + texts[60:]
    (record,) = rejections.records
    assert record["line"] == 31 and "row group 1" in record["reason"]
    assert rejections.categories == {"damaged": 30} and rejections.lines == 90


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
def test_a_table_without_the_column_counts_with_all_its_rows(tmp_path, kind):
    table = pyarrow.table({"body": ["x"] * 7, "n": range(7)})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        write_ipc(path, table, stream=False)
    else:
        path.write_text("body,n\n" + "x,1\n" * 7)
    (part,) = list_parts([str(path)], ReadOptions())
    rejections = Rejections(part)
    assert list(read_batches(part, ReadOptions(), rejections)) == []
    assert rejections.categories == {"malformed": 7}
    assert rejections.records[0]["reason"] == "no column 'text' (found: body, n; --text_field names another)"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_that_are_no_text_are_named_one_by_one(tmp_path, kind):
    raw = pyarrow.array([b"good", b"caf\xe9", None, b"good"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers(), null_count=1)
    tables = {"a": pyarrow.table({"text": text, "other": text}), "b": pyarrow.table({"text": [1, 2]})}
    for name, table in tables.items():
        path = tmp_path / f"{name}.{kind}"
        pyarrow.parquet.write_table(table, path) if kind == "parquet" else write_ipc(path, table, stream=True)
    for fields in (False, True):
        texts, rejected = read([tmp_path / f"a.{kind}"], fields=fields)
        assert texts == ["good", "good"]
        assert rejected == [(2, "malformed", "'text' is not UTF-8"), (3, "malformed", "'text' is not a string")]
    assert read([tmp_path / f"b.{kind}"])[1] == [(i, "malformed", "'text' is not a string") for i in (1, 2)]


def test_an_arrow_stream_that_is_cut_keeps_what_comes_before(tmp_path):
    table = pyarrow.table({"text": [f"{i} " + "x" * 5000 for i in range(10)]})
    write_ipc(tmp_path / "a.arrow", table, stream=True)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: len(content) * 3 // 4])
    texts, ((line, category, _),) = read([tmp_path / "a.arrow"])
    assert texts == table.column(0).to_pylist()[: len(texts)] and len(texts) >= 4
    assert (line, category) == (len(texts) + 1, "damaged")


# --- text


def test_paragraphs_are_what_blank_lines_set_off(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\none\nstill one\n \t\n\ntwo \xc3\xa9\r\n\r\n  three")
    assert read_all([tmp_path / "a.txt"], text_documents="paragraph") == ["one\nstill one", "two é", "  three"]
    ids = [fields["id"] for fields in fields_of(tmp_path / "a.txt", text_documents="paragraph")]
    assert ids == [f"{tmp_path}/a.txt:{line}" for line in (3, 7, 9)]
    assert read_all([tmp_path / "a.txt"]) == [(tmp_path / "a.txt").read_bytes().decode()]


@given(
    lines=st.lists(st.sampled_from(["a", "b c", "", " ", "é"]), max_size=20), newline=st.sampled_from(["\n", "\r\n"])
)
@settings(max_examples=80, deadline=None)
def test_paragraphs_are_those_of_a_naive_reading(lines, newline, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(newline.join(lines).encode())
    expected, paragraph = [], []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            expected.append(newline.join(paragraph))
            paragraph = []
    assert read_all([path], text_documents="paragraph") == expected


def test_bad_paragraphs_are_named_by_the_line_and_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        b"one\n\ntwo\nbad \xff here\n\nthree\n\n" + b"long line " * 20 + b"\nrest\n\n" + b"many\n" * 30 + b"\nlast\n"
    )
    texts, rejected = read([tmp_path / "a.txt"], text_documents="paragraph", max_document_bytes=100)
    assert texts == ["one", "three", "last"]
    assert [(line, category) for line, category, _ in rejected] == [
        (4, "malformed"),
        (8, "too long"),
        (11, "too long"),
    ]


def test_bad_text_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\ncaf\xe9")
    assert read([tmp_path / "a.txt"]) == ([], [(2, "malformed", "not UTF-8 at byte 8 of the file")])
    (tmp_path / "a.txt").write_bytes(b"x" * 101)
    ((line, category, reason),) = read([tmp_path / "a.txt"], max_document_bytes=100)[1]
    assert (line, category) == (1, "too long") and "--text_documents paragraph" in reason


# --- CSV


@given(
    rows=st.lists(st.lists(st.text(st.sampled_from('ab",\n\r é'), max_size=8), min_size=2, max_size=2), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=100, deadline=None)
def test_csv_that_python_wrote_is_read_as_it_was(rows, end, quoting, tmp_path_factory):
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # Python then writes "\r" bare, and cannot read it itself
        rows = [[text.replace("\r", "") for text in row] for row in rows]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as output:
        csv.writer(output, lineterminator=end, quoting=quoting).writerows([["text", "id"], *rows])
    texts, rejected = read([path])
    assert texts == [text for text, _ in rows if text.strip()]
    assert {category for _, category, _ in rejected} <= {"empty"}
    assert [fields["id"] for fields in fields_of(path)] == [id for text, id in rows if text.strip()]


def test_bad_rows_of_csv_are_named_by_their_first_line_and_cost_no_other(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,one\n2,"two\nlines"\n3\n4,caf\xe9\n5,"five" no\n6,six\n7,"'
        + b"long\n" * 40
        + b'x"\n8,eight\n9,"'
        + b"y" * 300
        + b'\nmore"\n10,ten\n'
    )
    texts, rejected = read([tmp_path / "a.csv"], max_document_bytes=100)
    assert texts == ["one", "two\nlines", "six", "eight", "ten"]
    assert [(line, category) for line, category, _ in rejected] == [
        (5, "malformed"),
        (6, "malformed"),
        (7, "malformed"),
        (9, "too long"),
        (51, "too long"),
    ]
    assert rejected[0][2] == "1 columns, the header has 2" and rejected[1][2] == "not UTF-8"


# --- WARC


def test_records_of_web_archives_carry_their_address(tmp_path):
    (tmp_path / "a.wet.gz").write_bytes(
        b"".join(gzip.compress(record(b"text", "conversion", "text/plain", 5)) for _ in "ab")
    )
    assert (
        fields_of(tmp_path / "a.wet.gz")
        == [
            {"id": "urn:uuid:5", "url": "http://example.org/5", "date": None},
        ]
        * 2
    )


def test_pages_of_plain_text_are_taken_as_they_were_sent(tmp_path):
    chunked = "4\r\nchun\r\n3\r\nked\r\n0\r\n\r\n"
    http = "application/http; msgtype=response"
    bodies = [
        response("plain"),
        response("latin \xe9".encode("latin-1"), "text/plain; charset=ISO-8859-1"),
        response(chunked, head="Transfer-Encoding: chunked\r\n"),
        response("chunks undone", head="Transfer-Encoding: chunked\r\n"),
        response(gzip.compress(b"packed"), head="Content-Encoding: gzip\r\n"),
        response("not found", status="404 Not Found"),
        response("PNG", "image/png"),
    ]
    records = [record(b"GET / HTTP/1.1\r\n\r\n", "request", http), *(record(body, "response", http) for body in bodies)]
    (tmp_path / "a.warc").write_bytes(b"".join(records) + record(b"resource", "resource", "text/plain"))
    assert read_all([tmp_path / "a.warc"]) == ["plain", "latin é", "chunked", "chunks undone", "packed", "resource"]


def test_html_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    for name in ("resiliparse", "resiliparse.extract", "resiliparse.extract.html2text"):
        monkeypatch.setitem(sys.modules, name, None)
    page = response("<p>text</p>", "text/html")
    (tmp_path / "a.warc").write_bytes(record(page, "response", "application/http"))
    with pytest.raises(UserError, match="pip install resiliparse"):
        read([tmp_path / "a.warc"])


def test_the_main_text_of_a_page_is_taken(tmp_path):
    pytest.importorskip("resiliparse")
    text = "<p>A paragraph that is long enough to be the main content of this page, caf\xe9 and all.</p>" * 3
    page = (
        f"<html><head><title>T</title></head><body><nav>Home</nav><main>{text}</main><script>x</script></body></html>"
    )
    content = response(page.encode("latin-1"), "text/html; charset=iso-8859-1")
    (tmp_path / "a.warc").write_bytes(record(content, "response", "application/http"))
    (found,) = read_all([tmp_path / "a.warc"])
    assert found.count("main content of this page, café and all.") == 3 and "Home" not in found and "<" not in found


def test_a_damaged_record_is_named_by_its_number_and_costs_no_other(tmp_path):
    good = [record(f"good {i}".encode(), "conversion", "text/plain") for i in range(4)]
    lost_head = record(b"text", "conversion", "text/plain")[10:]
    no_length = record(b"text", "conversion", "text/plain").replace(b"Content-Length: 4", b"Content-Length: x")
    not_utf8 = record(b"caf\xe9", "conversion", "text/plain")
    long = record(b"x" * 500, "conversion", "text/plain")
    content = b"".join([good[0], lost_head, good[1], no_length, good[2], not_utf8, long, good[3]])
    (tmp_path / "a.wet").write_bytes(content)
    texts, rejected = read([tmp_path / "a.wet"], max_document_bytes=400)
    assert texts == [f"good {i}" for i in range(4)]
    categories = [category for _, category, _ in rejected]
    assert categories.count("malformed") == 1 and categories.count("too long") == 1
    assert set(categories) == {"damaged", "malformed", "too long"} and len(categories) <= 5
    (tmp_path / "a.wet").write_bytes(content[:-9])
    texts, rejected = read([tmp_path / "a.wet"], max_document_bytes=400)
    assert texts == [f"good {i}" for i in range(3)]
    assert rejected[-1][2] == "its Content-Length does not lead to the next record"


def test_a_damaged_gzip_member_of_a_web_archive_costs_few_other_records(tmp_path):
    import random

    numbers = random.Random(0)
    texts = [f"{i} " + "".join(numbers.choices("abcdefghijklmnop", k=2000)) for i in range(100)]
    members = [bytearray(gzip.compress(record(text.encode(), "conversion", "text/plain"))) for text in texts]
    members[50][500] ^= 0xFF
    members[50][510] ^= 0xFF
    (tmp_path / "a.wet.gz").write_bytes(b"".join(members))
    found, rejected = read([tmp_path / "a.wet.gz"])
    assert found[:50] == texts[:50] and found[-30:] == texts[-30:] and set(found) <= set(texts)
    assert rejected and {category for _, category, _ in rejected} == {"damaged"}


# --- data sets


def test_a_data_set_on_disk_is_cut_by_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"document {i}" for i in range(100)]
    data = datasets.Dataset.from_dict({"text": texts, "n": list(range(100))}).select(range(99, -1, -1))
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    for name in (f"dataset:{tmp_path}/one", f"dataset:{tmp_path}/both", f"dataset:{tmp_path}/both?split=train"):
        assert len(list_parts([name], ReadOptions(part_bytes=1000))) > 2
        assert read_all([name], part_bytes=1000) == texts[::-1]
    assert read_all([f"dataset:{tmp_path}/both?split=test"]) == texts[:-4:-1]
    assert [fields["n"] for fields in fields_of(f"dataset:{tmp_path}/one", part_bytes=500)] == list(range(99, -1, -1))
    with pytest.raises(UserError, match=r"no split 'dev'; expected one of: train, test"):
        read_all([f"dataset:{tmp_path}/both?split=dev"])
    with pytest.raises(UserError, match=r"unknown setting 'spilt': did you mean split"):
        read_all([f"dataset:{tmp_path}/both?spilt=dev"])


def test_a_folder_of_files_is_a_data_set_that_streams(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_bytes(jsonl([f"{number} {text}" for text in TEXTS]))
    name = f"dataset:{folder}"
    parts = list_parts([name], ReadOptions())
    assert [(part.start, part.end) for part in parts] == [(0, 1), (1, 2), (2, 3)]
    assert sum(part.bytes for part in parts) == sum(path.stat().st_size for path in folder.iterdir())
    assert sorted(read_all([name])) == sorted(f"{number} {text}" for number in range(3) for text in TEXTS)
    assert read([name], text_field="body")[1][0][2].startswith("no column 'body' (found: text, n")
    assert not any(path.suffix == ".arrow" for path in tmp_path.rglob("*"))


def test_a_data_set_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"--input dataset:{tmp_path}/none"):
        list_parts([f"dataset:{tmp_path}/none"], ReadOptions())


# --- any damage


def test_no_damage_raises_anything(tmp_path):
    import random

    texts = [text * 3 for text in TEXTS] * 12
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl(texts)))
        (tmp_path / f"a.csv{suffix}").write_bytes(compress(as_csv(texts)))
        (tmp_path / f"a.wet{suffix}").write_bytes(compress(wet(texts)))
    pages = [record(response(text), "response", "application/http") for text in texts]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, pages)))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    write_ipc(tmp_path / "file.arrow", table, stream=False)
    write_ipc(tmp_path / "stream.arrow", table, stream=True)
    numbers = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            at = numbers.randrange(len(content))
            match numbers.randrange(4):
                case 0:
                    damaged[at] ^= 1 << numbers.randrange(8)
                case 1:
                    del damaged[at:]
                case 2:
                    del damaged[at : at + numbers.randrange(1, 20)]
                case 3:
                    damaged[at:at] = numbers.randbytes(10)
            path.write_bytes(damaged)
            read([path], part_bytes=700)
            read([path], fields=True, text_documents="paragraph", max_document_bytes=100)
        path.unlink()
