"""What has a final name is whole: old content stays until new content is complete."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_no_two_writers_share_a_temporary_name(tmp_path, monkeypatch):
    """Not in one process, nor on two hosts where process ids repeat."""
    names = {durable.temporary_name(tmp_path / "a.bin") for _ in range(100)}
    assert len(names) == 100
    here = names.pop().name.split("-")[0]
    monkeypatch.setattr(durable, "host_name", lambda: "elsewhere_01234567")
    assert not durable.temporary_name(tmp_path / "a.bin").name.startswith(here)


def test_only_what_nobody_writes_any_more_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, day = durable.host_name(), 86_400
    ages = {  # seconds
        f"a.{here}-{os.getpid()}-0.partial": 0,  # of a running process
        f"b.{here}-{ended.pid}-0.partial": 0,
        "c.elsewhere-1-0.partial": 0,  # who knows
        "d.elsewhere-1-0.partial": day + 60,
        "e.1.partial": 0,  # of an older version
        f"f.{here}-{os.getppid()}-0.partial": 0,  # known to have ended
    }
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / f"folder.{here}-{ended.pid}-0.partial").mkdir()
    (tmp_path / "whole").write_text("")
    for name, age in ages.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)

    def left():
        return "".join(sorted(path.name[0] for path in tmp_path.rglob("*")))

    durable.remove_temporary_files(tmp_path, ended=[os.getppid()])
    assert left() == "aceiw"
    durable.remove_temporary_files(tmp_path, alone=True)
    assert left() == "aiw"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*wanted'"), durable.replacing(tmp_path / "wanted"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="other") as error, durable.replacing(tmp_path / "wanted"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "other")
    assert error.value.filename == "other"
    with pytest.raises(OSError, match="Input/output error") as error, durable.replacing(tmp_path / "wanted"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # of whatever was read meanwhile
    assert error.value.filename is None


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


def test_of_many_that_create_a_file_one_succeeds_and_the_file_is_whole(tmp_path):
    path = tmp_path / "claim"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: durable.create(path, f"owner {number}".encode()), range(50)))
    assert sum(made) == 1
    assert path.read_text() == f"owner {made.index(True)}"
    assert [found.name for found in tmp_path.iterdir()] == ["claim"]
    with pytest.raises(FileNotFoundError):
        durable.create(tmp_path / "gone/claim", b"")


def test_a_file_is_created_once_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert durable.create(tmp_path / "claim", b"first")
    assert not durable.create(tmp_path / "claim", b"second")
    assert (tmp_path / "claim").read_bytes() == b"first"
