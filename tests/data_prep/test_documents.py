"""Documents in, each exactly once, whatever the kind of file and wherever it is cut; bad ones named and skipped."""

import argparse
import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import documents
from data_prep.documents import Part, ReadOptions, Rejections, find_inputs, list_parts, number_lines, read_batches
from data_prep.errors import UserError

TEXTS = ["One.", "Zwei\nZeilen", "日本語 👍🏽", "  spaces \u2028 and\ttabs ", 'quotes " and \\ ' * 50]


def jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read(inputs, **options):
    """(texts, rejections as (line, category, reason), parts' summaries), lines counted from the beginning of files."""
    reading = ReadOptions(**options)
    parts = list_parts([str(name) for name in inputs], reading)
    texts, summaries = [], []
    for part in parts:
        rejections = Rejections(part)
        for batch in read_batches(part, reading, rejections):
            assert len(batch.texts) == len(batch.fields) == len(batch.lines) > 0
            texts += batch.texts
        summaries.append({"rejected": rejections.records, "lines": rejections.lines})
    records = [record for summary in number_lines(parts, summaries) for record in summary["rejected"]]
    return texts, [(record["line"], record["category"], record["reason"]) for record in records]


def read_all(inputs, **options) -> list[str]:
    texts, rejected = read(inputs, **options)
    assert rejected == []
    return texts


line_of_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["\x00blank", "\x00bad", "\x00long"]),
)


@given(
    lines=st.lists(line_of_text, min_size=1, max_size=12),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    ends_with_newline=st.booleans(),
    mark=st.booleans(),
    part_bytes=st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_parts_cut_anywhere_lose_and_repeat_no_document(
    lines, newline, ends_with_newline, mark, part_bytes, tmp_path_factory
):
    path = tmp_path_factory.mktemp("cut") / "d.jsonl"
    special = {"\x00blank": b"  ", "\x00bad": b'{"text": 1}', "\x00long": b'{"text": "' + b"x" * 300 + b'"}'}
    encoded = [special.get(text, json.dumps({"text": text}).encode()) for text in lines]
    content = b"\xef\xbb\xbf" * mark + newline.join(encoded) + newline * ends_with_newline
    path.write_bytes(content)
    parts = list_parts([str(path)], ReadOptions(part_bytes=part_bytes))
    assert [part.start for part in parts] == list(range(0, len(content), part_bytes))
    assert sum(part.bytes for part in parts) == len(content)
    texts, rejected = read([path], part_bytes=part_bytes, max_document_bytes=250)
    assert texts == [text for text in lines if text not in special and text.strip()]
    kinds = {"\x00bad": "malformed", "\x00long": "too long"}
    assert [(line, category) for line, category, _ in rejected] == [
        (number, kinds.get(text, "empty"))
        for number, text in enumerate(lines, 1)
        if text in kinds or (text not in special and not text.strip())
    ]


def test_a_part_is_small_and_says_what_it_is():
    part = Part("a.jsonl", 64_000_000, 128_000_000, 64_000_000)
    assert pickle.loads(pickle.dumps(part)) == part and len(pickle.dumps(part)) < 200
    assert repr(part) == "Part(path='a.jsonl', start=64000000, end=128000000, bytes=64000000)"


def test_inputs_are_each_taken_once_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_bytes(jsonl(["x"]))
    found = find_inputs([f"{tmp_path}/c[1].jsonl", f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"])
    assert [Path(file.name).name for file in found] == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    assert [file.bytes for file in found] == [len(jsonl(["x"]))] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl matches no file"),
        ("*.nothing", "matches no file"),
        (".", r"is a folder: name its files \(for example .*/\*\.jsonl\)"),
        ("table.xlsx", "unknown kind of file, expected one of .jsonl"),
    ],
)
def test_inputs_that_are_no_documents_are_refused(tmp_path, name, message):
    (tmp_path / "table.xlsx").write_text("a,b\n")
    with pytest.raises(UserError, match=message) as error:
        find_inputs([f"{tmp_path}/{name}"])
    assert "\n" not in str(error.value)


def test_an_address_that_nothing_serves_is_refused():
    with pytest.raises(UserError, match=r"nowhere://x/a\.jsonl"):
        find_inputs(["nowhere://x/a.jsonl"])


def test_a_file_that_vanished_is_an_error_of_the_storage_not_of_the_data(tmp_path):
    part = Part(str(tmp_path / "gone.jsonl.gz"), 0, -1, 10)
    with pytest.raises(FileNotFoundError):
        list(read_batches(part, ReadOptions(), Rejections(part)))


def test_a_line_in_a_later_part_gets_its_number_in_the_file_without_reading_it_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["good"] * 40) + b"bad\n" + jsonl(["good"] * 40))
    reading = ReadOptions(part_bytes=300)
    parts, summaries = list_parts([str(path)], reading), []
    for part in parts:
        rejections = Rejections(part)
        places = [batch.place(i) for batch in read_batches(part, reading, rejections) for i in range(len(batch.texts))]
        samples = {"reason": [{"key": 1, "place": place, "text": "good"} for place in places]}
        summaries.append({"rejected": rejections.records, "lines": rejections.lines, "steps": {"a": samples}})
    assert len(parts) > 3
    (record,) = [record for summary in summaries for record in summary["rejected"]]
    assert "@" in record["file"]
    numbered = number_lines(parts, summaries)
    (record,) = [record for summary in numbered for record in summary["rejected"]]
    assert (record["file"], record["line"]) == (str(path), 41)
    shown = [sample["place"] for summary in numbered for sample in summary["steps"]["a"]["reason"]]
    assert shown == [f"{path}:{line}" for line in range(1, 82) if line != 41]


def test_the_lines_of_every_file_are_counted_from_its_own_beginning(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(["good"] * 9) + b"bad\n")
    _, rejected = read([f"{tmp_path}/*.jsonl"], part_bytes=50)
    assert [line for line, _, _ in rejected] == [10, 10]


def test_all_rejections_are_counted_and_a_bounded_number_described(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" * 4000 + b'{"text": " "}\n' * 30)
    (part,) = list_parts([str(tmp_path / "a.jsonl")], ReadOptions())
    rejections = Rejections(part)
    assert list(read_batches(part, ReadOptions(), rejections)) == []
    assert rejections.categories == {"malformed": 4000, "empty": 30}
    assert len(rejections.records) == 2500 + 30 and rejections.lines == 4030


def test_batches_are_about_two_megabytes_and_tell_the_bytes_that_they_took(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 99_000] * 50))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["x" * 99_000] * 50)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99_000] * 50}), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        (part,) = list_parts([str(path)], ReadOptions())
        batches = list(read_batches(part, ReadOptions(), Rejections(part)))
        sizes = [sum(map(len, batch.texts)) for batch in batches]
        assert all(2_000_000 < size < 2_300_000 for size in sizes[:-1]) and sum(sizes) == 50 * 99_000
        assert sum(batch.consumed for batch in batches) == path.stat().st_size


def test_other_fields_are_carried_where_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "yes", "meta": {"a": [1, null]}}\n')
    (part,) = list_parts([str(tmp_path / "a.jsonl")], ReadOptions())
    for fields, expected in ((False, {}), (True, {"id": "x", "meta": {"a": [1, None]}})):
        (batch,) = read_batches(part, ReadOptions(fields=fields), Rejections(part))
        assert (batch.texts, batch.fields, batch.lines) == (["yes"], [expected], [1])
        assert batch.select([]).texts == [] and batch.select([0]) == batch


def test_the_flags_make_the_options(tmp_path):
    parser = argparse.ArgumentParser()
    documents.add_input_arguments(parser)
    chosen = ReadOptions.of(parser.parse_args(["--input", "a.jsonl"]))
    assert chosen == ReadOptions()
    flags = ["--input", "a", "--text_field", "body", "--id_field", "n", "--text_documents", "paragraph"]
    sizes = ["--max_document_megabytes", "0.5", "--part_megabytes", "2"]
    chosen = ReadOptions.of(parser.parse_args([*flags, *sizes]), fields=True)
    assert chosen == ReadOptions("body", "n", 2_000_000, True, 500_000, "paragraph")
    assert replace(chosen, text_field="text") != chosen and repr(chosen) == repr(replace(chosen))


def test_a_glob_passes_over_what_a_stage_could_not_read(tmp_path):
    for name in ("documents-000000.jsonl", "rejected.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    [found] = find_inputs([f"{tmp_path}/*.jsonl"])
    assert found.name == f"{tmp_path}/documents-000000.jsonl"
    assert find_inputs([f"{tmp_path}/rejected.jsonl"])[0].bytes == 14  # named, it is an input like any other
