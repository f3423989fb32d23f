"""Local and remote names are read alike."""

import gzip
import os

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import files
from data_prep.documents import find_inputs
from tests.data_prep.test_documents import TEXTS, jsonl, read_all


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_remote_files_give_the_same_documents_in_parts_and_by_globs(memory):
    memory.pipe("/corpus/a.jsonl", jsonl(TEXTS))
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    memory.pipe("/corpus/c.jsonl.zst", pyarrow.compress(jsonl(TEXTS), codec="zstd", asbytes=True))
    with memory.open("/corpus/d.parquet", "wb") as output:
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), output, row_group_size=2)
    assert [file.name for file in find_inputs(["memory://corpus/*"])] == [
        f"memory:///corpus/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    ]
    for part_bytes in (50, 1 << 20):
        assert read_all(["memory://corpus/*"], part_bytes=part_bytes) == TEXTS * 4
        assert read_all(["memory://corpus/a.jsonl"], part_bytes=part_bytes) == TEXTS


def test_a_file_address_is_a_local_file(tmp_path):
    (tmp_path / "a[1].jsonl").write_bytes(jsonl(TEXTS))
    assert read_all([f"file://{tmp_path}/a[1].jsonl"]) == TEXTS


def test_the_state_of_a_file_changes_with_its_content(tmp_path, memory):
    (tmp_path / "a.jsonl").write_bytes(b"1")
    before = files.state(str(tmp_path / "a.jsonl"))
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert before[0] == 1 and files.state(str(tmp_path / "a.jsonl")) == (1, 1) != before
    memory.pipe("/a.jsonl", b"12")
    first = files.state("memory://a.jsonl")
    memory.pipe("/a.jsonl", b"12")
    assert first[0] == 2 and files.state("memory://a.jsonl") != first
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "a").write_bytes(b"123")
    assert files.state(f"dataset:{tmp_path}/folder?split=test")[0] == 3


def test_a_failure_of_a_remote_read_is_an_error_of_the_storage(memory, monkeypatch):
    memory.pipe("/a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    with files.Watched("memory://a.jsonl.gz") as file:
        monkeypatch.setattr(file._file, "readinto", lambda buffer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.buffered("a.jsonl.gz", file).read()
        with pytest.raises(OSError, match=r"memory://a.jsonl.gz: cannot be read: division by zero"):
            file.raise_failure()
