"""What has a final name is whole: old content stays until new content is complete."""

import hashlib
import json
import math

import pytest

from data_prep import durable


def test_an_exception_in_mid_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), durable.replacing(path) as file:
        file.write(b"half of the ne")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_the_name_appears_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new_folder" / "file"
    with durable.replacing(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_temporary_names_are_in_the_same_folder_and_recognisable(tmp_path):
    name = durable.temporary_name(tmp_path / "a.bin")
    assert name.parent == tmp_path
    assert name.name.startswith("a.bin.") and name.suffix == durable.TEMPORARY_SUFFIX


def test_json_floats_round_trip_and_nan_is_refused(tmp_path):
    path = tmp_path / "value.json"
    value = {"third": 1 / 3, "tiny": 5e-324, "name": "naïve 日本"}
    durable.write_json(path, value)
    assert json.loads(path.read_bytes()) == value
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(path, {"loss": math.nan})
    assert json.loads(path.read_bytes()) == value


def test_a_folder_takes_its_name_whole(tmp_path):
    folder = tmp_path / "result"
    with durable.replacing_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"1")
        assert not folder.exists()
    assert (folder / "inner" / "file").read_bytes() == b"1"
    assert [found.name for found in tmp_path.iterdir()] == ["result"]


def test_an_exception_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), durable.replacing_folder(tmp_path / "result") as temporary:
        (temporary / "file").write_bytes(b"1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    with pytest.raises(FileExistsError), durable.replacing_folder(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_a_folder_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").write_bytes(b"1")
    with pytest.raises(RuntimeError), durable.replacing_folder(folder, overwrite=True) as temporary:
        (temporary / "new").write_bytes(b"2")
        raise RuntimeError
    assert [found.name for found in tmp_path.rglob("*")] == ["result", "old"]
    with durable.replacing_folder(folder, overwrite=True) as temporary:
        (temporary / "new").write_bytes(b"2")
        assert (folder / "old").exists()
    assert [found.name for found in tmp_path.rglob("*")] == ["result", "new"]


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert durable.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
