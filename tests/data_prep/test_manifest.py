"""A folder without a whole manifest is unfinished, and says so."""

import json
import os

import pytest

from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    describe_inputs,
    is_current,
    read_manifest,
    verify_files,
)

JOB = {"command": "tokenize", "input": ["a", "b"], "part_bytes": 3}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").write_bytes(b"content")
    files = {"data": FileRecord.of(tmp_path / "data")}
    Manifest(kind="shards", job=JOB, files=files, content={"documents": 1}).write(tmp_path)
    return tmp_path


def test_a_manifest_round_trips(folder):
    manifest = read_manifest(folder, "shards")
    assert manifest.job == JOB and manifest.content == {"documents": 1}
    assert manifest.files == {"data": FileRecord.of(folder / "data")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"kind": "shards", "job": {}, "files": [], "content": {}, "format_version": 1}', "is damaged"),
        ('{"kind": "shards", "job": {}, "files": {}, "content": {}, "format_version": 2}', "version 2, expected 1"),
        ('{"kind": "documents", "job": {}, "files": {}, "content": {}, "format_version": 1}', "holds documents"),
    ],
)
def test_a_manifest_that_is_not_ours_is_one_error_naming_it(folder, text, message):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(folder, "shards")
    assert str(folder) in str(error.value)


def test_a_missing_manifest_says_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"manifest\.json is missing: expected a folder of shards"):
            read_manifest(path, "shards")


def test_current_means_equal_job_and_no_younger_input(folder, tmp_path_factory):
    source = tmp_path_factory.mktemp("input") / "source"
    source.write_bytes(b"")
    finished = (folder / MANIFEST_NAME).stat().st_mtime_ns
    os.utime(source, ns=(finished, finished))
    assert is_current(folder, JOB, [InputFile.of(str(source))])
    assert not is_current(folder, {**JOB, "part_bytes": 4}, [InputFile.of(str(source))])
    os.utime(source, ns=(finished + 1, finished + 1))
    assert not is_current(folder, JOB, [InputFile.of(str(source))])
    assert not is_current(tmp_path_factory.mktemp("empty"), JOB, [])


@pytest.mark.parametrize("name", ["s3://bucket/a.jsonl", "dataset:some/name"])
def test_another_version_of_a_remote_input_is_not_current(tmp_path, name):
    inputs = [InputFile(name, 10, "version 1")]
    Manifest(kind="shards", job={**JOB, "inputs": describe_inputs(inputs)}, files={}).write(tmp_path)
    assert is_current(tmp_path, JOB, inputs)
    assert not is_current(tmp_path, JOB, [InputFile(name, 10, "version 2")])
    assert not is_current(tmp_path, JOB, [*inputs, InputFile("s3://bucket/b.jsonl", 0, "version 1")])


def test_an_old_manifest_knows_nothing_of_remote_inputs(folder):
    assert is_current(folder, JOB, [])
    assert not is_current(folder, JOB, [InputFile("s3://bucket/a.jsonl", 10, "version 1")])


@pytest.mark.parametrize("change", ["one more", "one less", "another size"])
def test_local_inputs_with_old_time_stamps_are_noticed_all_the_same(tmp_path, change):
    inputs = [InputFile("a", 1, 0), InputFile("b", 1, 0)]
    Manifest(kind="shards", job={**JOB, "inputs": describe_inputs(inputs)}, files={}).write(tmp_path)
    changed = {
        "one more": [*inputs, InputFile("c", 1, 0)],
        "one less": inputs[:1],
        "another size": [inputs[0], InputFile("b", 2, 0)],
    }
    assert is_current(tmp_path, JOB, inputs[::-1])
    assert not is_current(tmp_path, JOB, changed[change])


def test_every_changed_file_is_named(folder):
    manifest = read_manifest(folder)
    assert verify_files(folder, manifest, lambda _: None) == []
    (folder / "data").write_bytes(b"c0ntent")
    assert "data: content differs" in verify_files(folder, manifest, lambda _: None)[0]
    (folder / "data").write_bytes(b"longer content")
    assert "data: 14 bytes, expected 7" in verify_files(folder, manifest, lambda _: None)[0]
    (folder / "data").unlink()
    assert "data: missing" in verify_files(folder, manifest, lambda _: None)[0]


def test_a_manifest_edited_by_hand_is_noticed(folder):
    raw = json.loads((folder / MANIFEST_NAME).read_bytes())
    raw["content"]["documents"] = 2
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))
    faults = verify_files(folder, read_manifest(folder), lambda _: None)
    assert faults == [f"{folder / MANIFEST_NAME}: content differs from its own sha256"]
