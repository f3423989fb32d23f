"""Documents in, each exactly once, whatever the kind of file and wherever it is cut."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.documents import Part, ReadOptions, find_inputs, list_parts, read_documents
from data_prep.errors import UserError

TEXTS = ["One.", "Zwei\nZeilen", "日本語 👍🏽", "", "  spaces \u2028 and\ttabs ", 'quotes " and \\ ' * 50]


def jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read_all(inputs: list[str], part_bytes: int = 1 << 20) -> list[str]:
    return [text for part in list_parts(inputs, ReadOptions(part_bytes=part_bytes)) for text, _ in read_documents(part)]


@given(
    lines=st.lists(
        st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(["\x00blank"])),
        min_size=1,
        max_size=12,
    ),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    ends_with_newline=st.booleans(),
    part_bytes=st.integers(1, 300),
)
@settings(max_examples=150, deadline=None)
def test_parts_cut_anywhere_lose_and_repeat_no_document(
    lines, newline, ends_with_newline, part_bytes, tmp_path_factory
):
    path = tmp_path_factory.mktemp("cut") / "d.jsonl"
    encoded = [b"  " if text == "\x00blank" else json.dumps({"text": text}).encode() for text in lines]
    content = newline.join(encoded) + (newline if ends_with_newline else b"")
    path.write_bytes(content)
    parts = list_parts([str(path)], ReadOptions(part_bytes=part_bytes))
    assert [part.start for part in parts] == list(range(0, len(content), part_bytes))
    assert sum(part.bytes for part in parts) == len(content)
    assert [text for part in parts for text, _ in read_documents(part)] == [
        text for text in lines if text != "\x00blank"
    ]


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "a.ndjson.zst").write_bytes(zstd(jsonl(TEXTS[:3])) + zstd(jsonl(TEXTS[3:])))  # two frames
    pyarrow.parquet.write_table(pyarrow.table({"n": range(6), "text": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "a.parquet"):
        assert read_all([str(tmp_path / name)]) == TEXTS, name
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    assert read_all([f"{tmp_path}/*.txt"]) == TEXTS


def test_progress_adds_up_to_the_bytes_of_the_input(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        (part,) = list_parts([str(path)], ReadOptions(part_bytes=1 << 20))
        assert sum(size for _, size in read_documents(part)) == path.stat().st_size


def test_a_byte_order_mark_is_not_part_of_the_first_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS))
    assert read_all([str(tmp_path / "a.jsonl")]) == TEXTS


def test_another_field_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": 3}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["yes"], "text": [3]}), tmp_path / "a.parquet")
    for part in list_parts([f"{tmp_path}/*"], ReadOptions(part_bytes=100)):
        assert [text for text, _ in read_documents(part, "body")] == ["yes"]


def test_inputs_are_each_taken_once_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_bytes(jsonl(["x"]))
    found = find_inputs([f"{tmp_path}/c[1].jsonl", f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"])
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c[1].jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl matches no file"),
        ("*.nothing", "matches no file"),
        (".", r"is a folder: name its files \(for example .*/\*\.jsonl\)"),
        ("table.csv", "unknown kind of file, expected one of .jsonl"),
    ],
)
def test_inputs_that_are_no_documents_are_refused(tmp_path, name, message):
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=message):
        find_inputs([f"{tmp_path}/{name}"])


BAD_LINES = {
    b'{"text": "unfinished': r"not JSON \(Invalid control character at at column 21\)",
    b'{"body": "x", "id": 1}': r"no field 'text' \(found: body, id; --text_field names another\)",
    b'{"text": 5}': "'text' is not a string",
    b'{"text": null}': "'text' is not a string",
    b'["text"]': "a JSON list, not an object",
    b'"text"': "a JSON str, not an object",
    b'{"text": "caf\xe9"}': "not UTF-8 at byte 13 of the line",
    rb'{"text": "ab\ud800"}': "'text' holds a lone surrogate at character 2",
    b'{"text": "ab\xed\xa0\x80"}': "not UTF-8 at byte 12 of the line",
    b"[" * 100_000: "not JSON of a sane depth",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_named_by_its_number_also_in_a_later_part(tmp_path, line, suffix):
    good = jsonl([f"document {i}" for i in range(40)])
    content = good + line + b"\n" + good
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix](content))
    parts = list_parts([str(path)], ReadOptions(part_bytes=300))
    assert len(parts) > 3 or suffix
    with pytest.raises(UserError, match=rf"{path}:41: {BAD_LINES[line]}; expected one JSON object a line") as error:
        for part in parts:
            list(read_documents(part))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated gz", "damaged gz", "no gz", "truncated zst", "no zst"])
def test_a_damaged_compressed_file_is_one_error_naming_it(tmp_path, kind):
    content = jsonl([f"document {i}" for i in range(5000)])
    packed = bytearray(gzip.compress(content) if kind.endswith("gz") else zstd(content))
    if kind.startswith("truncated"):
        packed = packed[:-9]
    elif kind.startswith("damaged"):
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(content)
    path = tmp_path / f"a.jsonl.{kind[-3:].strip()}"
    path.write_bytes(packed)
    with pytest.raises(UserError) as error:
        read_all([str(path)])
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", b'{"text": "x"}\n'])
def test_what_is_not_parquet_is_one_error_naming_it(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        read_all([str(path)])
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"no column 'text' \(found: body\)"),
        ({"text": ["x", None]}, "row 1: 'text' is not a string"),
        ({"text": [1]}, "row 0: 'text' is not a string"),
    ],
)
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_all([str(tmp_path / "a.parquet")])


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    raw = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        read_all([str(tmp_path / "a.parquet")])


def test_a_text_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 3"):
        read_all([str(tmp_path / "a.txt")])


def test_a_part_of_an_unlisted_range_still_starts_at_a_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["first", "second"]))
    size = (tmp_path / "a.jsonl").stat().st_size
    assert [text for text, _ in read_documents(Part(str(tmp_path / "a.jsonl"), 1, size))] == ["second"]
