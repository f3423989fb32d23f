"""A folder without a whole manifest is unfinished, and says so."""

import json
import os

import pytest

from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, FileRecord, Manifest, is_current, read_manifest, verify_files

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
    assert is_current(folder, JOB, [source])
    assert not is_current(folder, {**JOB, "part_bytes": 4}, [source])
    os.utime(source, ns=(finished + 1, finished + 1))
    assert not is_current(folder, JOB, [source])
    assert not is_current(tmp_path_factory.mktemp("empty"), JOB, [])


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
