"""Token shards are Megatron-Core's format, byte for byte, and damage is one clear error."""

import itertools
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest
from data_prep.shards import Shard, ShardSet, ShardWriter, dtype_for, unigram_entropy

UINT16, INT32 = np.dtype("<u2"), np.dtype("<i4")


def write_shard(prefix: Path, documents: list[list[int]], dtype: np.dtype) -> ShardWriter:
    with ShardWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.append(np.array(ids, dtype=dtype))
    return writer


def write_shard_set(folder: Path, shards: list[list[list[int]]], vocab_size: int, end_of_document: int = 0) -> ShardSet:
    writers = [
        write_shard(folder / f"{index:06d}", documents, dtype_for(vocab_size)) for index, documents in enumerate(shards)
    ]
    Manifest(
        kind="shards",
        job={"command": "test"},
        files={name: record for writer in writers for name, record in writer.files.items()},
        content={
            "documents": sum(writer.documents for writer in writers),
            "tokens": sum(writer.tokens for writer in writers),
            "tokenizer": {"fingerprint": "f" * 64, "vocab_size": vocab_size, "end_of_document": end_of_document},
            "shards": [
                {"name": f"{index:06d}", "documents": writer.documents, "tokens": writer.tokens}
                for index, writer in enumerate(writers)
            ],
        },
    ).write(folder)
    return ShardSet.open(folder)


@given(data=st.data(), dtype=st.sampled_from([UINT16, INT32]))
@settings(max_examples=60, deadline=None)
def test_any_documents_round_trip(data, dtype, tmp_path_factory):
    ids = st.integers(0, np.iinfo(dtype).max)
    documents = data.draw(st.lists(st.lists(ids, max_size=20), max_size=12))
    prefix = tmp_path_factory.mktemp("shard") / "s"
    writer = write_shard(prefix, documents, dtype)
    shard = Shard(prefix)
    assert [shard.document(index).tolist() for index in range(shard.documents)] == documents
    assert shard.tokens.tolist() == [id_ for document in documents for id_ in document]
    assert shard.document_offsets.tolist() == [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    assert [shard.document_offset(i) for i in range(len(documents) + 1)] == shard.document_offsets.tolist()
    assert (writer.documents, writer.tokens) == (len(documents), len(shard.tokens))
    assert writer.files == {f"s{suffix}": FileRecord.of(prefix.with_suffix(suffix)) for suffix in (".bin", ".idx")}


@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), max_size=8), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_batches_of_documents_make_the_bytes_of_single_ones(documents, cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    write_shard(folder / "single", documents, UINT16)
    bounds = sorted({0, len(documents), *(cut for cut in cuts if cut < len(documents))})
    with ShardWriter(folder / "batches", UINT16) as writer:
        for start, end in itertools.pairwise(bounds):
            batch = documents[start:end]
            flat = np.array([id_ for ids in batch for id_ in ids], dtype=np.uint32)
            writer.append_batch(flat, np.array([len(ids) for ids in batch], dtype=np.int64))
    for suffix in (".bin", ".idx"):
        assert (folder / f"batches{suffix}").read_bytes() == (folder / f"single{suffix}").read_bytes()
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))


@pytest.mark.parametrize("id_", [-1, 65_536])
def test_an_id_that_the_dtype_does_not_hold_is_refused(tmp_path, id_):
    with pytest.raises(ValueError, match="do not fit uint16"), ShardWriter(tmp_path / "s", UINT16) as writer:
        writer.append(np.array([1, id_], dtype=np.int32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "code", "itemsize"), [(UINT16, 8, 2), (INT32, 4, 4)])
def test_the_files_follow_megatrons_layout(tmp_path, dtype, code, itemsize):
    write_shard(tmp_path / "s", [[1, 2, 3], [], [65_000, 5]], dtype)
    expected = b"MMIDIDX\x00\x00"
    expected += struct.pack("<Q", 1)  # version
    expected += struct.pack("<B", code)
    expected += struct.pack("<Q", 3)  # sequences
    expected += struct.pack("<Q", 4)  # document indices
    expected += struct.pack("<3i", 3, 0, 2)  # tokens of each sequence
    expected += struct.pack("<3q", 0, 3 * itemsize, 3 * itemsize)  # where each starts in the .bin
    expected += struct.pack("<4q", 0, 1, 2, 3)  # first sequence of each document
    assert (tmp_path / "s.idx").read_bytes() == expected
    assert (tmp_path / "s.bin").read_bytes() == struct.pack({2: "<5H", 4: "<5i"}[itemsize], 1, 2, 3, 65_000, 5)


def test_shards_of_several_sequences_a_document_are_read(tmp_path):
    """Megatron writes such shards with --split-sentences; ours never are."""
    (tmp_path / "s.bin").write_bytes(struct.pack("<6H", 1, 2, 3, 4, 5, 6))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    (tmp_path / "s.idx").write_bytes(
        header + struct.pack("<3i", 1, 2, 3) + struct.pack("<3q", 0, 2, 6) + struct.pack("<3q", 0, 2, 3)
    )
    shard = Shard(tmp_path / "s")
    assert [shard.document(0).tolist(), shard.document(1).tolist()] == [[1, 2, 3], [4, 5, 6]]


def test_the_dtype_changes_where_megatrons_does():
    assert dtype_for(65_499) == np.uint16
    assert dtype_for(65_500) == np.int32
    assert dtype_for(65_536) == np.int32


def test_nothing_has_a_final_name_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s", UINT16) as writer:
        writer.append(np.array([1, 2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def damage_magic(prefix: Path) -> Path:
    path = prefix.with_suffix(".idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])
    return path


def damage_version(prefix: Path) -> Path:
    path = prefix.with_suffix(".idx")
    content = path.read_bytes()
    path.write_bytes(content[:9] + struct.pack("<Q", 2) + content[17:])
    return path


def damage_count(prefix: Path) -> Path:
    path = prefix.with_suffix(".idx")
    content = path.read_bytes()
    path.write_bytes(content[:18] + b"\xff" * 8 + content[26:])
    return path


def truncate(suffix: str, size: int):
    def damage(prefix: Path) -> Path:
        path = prefix.with_suffix(suffix)
        path.write_bytes(path.read_bytes()[:size])
        return path

    return damage


def remove(suffix: str):
    def damage(prefix: Path) -> Path:
        path = prefix.with_suffix(suffix)
        path.unlink()
        return path

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_magic,
        damage_version,
        damage_count,
        truncate(".idx", 0),
        truncate(".idx", 20),
        truncate(".idx", -1),
        truncate(".bin", 0),
        truncate(".bin", -2),
        remove(".idx"),
        remove(".bin"),
    ],
)
def test_damage_is_one_error_naming_the_file(tmp_path, damage):
    write_shard(tmp_path / "s", [[1, 2, 3], [4]], UINT16)
    path = damage(tmp_path / "s")
    with pytest.raises(UserError) as error:
        Shard(tmp_path / "s")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shard_of_other_documents_than_the_manifest_says_is_refused(tmp_path):
    shards = write_shard_set(tmp_path, [[[1, 0]], [[2, 3, 0]]], vocab_size=10)
    write_shard(tmp_path / "000001", [[2, 0], [3, 0]], UINT16)
    assert shards.shard(0).documents == 1
    with pytest.raises(UserError, match=r"000001\.bin holds 2 documents and 4 tokens, the manifest says 1 and 3"):
        shards.shard(1)


def test_a_manifest_without_shards_is_an_error_naming_it(tmp_path):
    Manifest(kind="shards", job={}, files={}, content={}).write(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        ShardSet.open(tmp_path)


def test_the_fingerprint_follows_the_tokens(tmp_path):
    first, same, other = (
        write_shard_set(tmp_path / name, [documents], vocab_size=10).fingerprint
        for name, documents in (("a", [[1, 0]]), ("b", [[1, 0]]), ("c", [[2, 0]]))
        if (tmp_path / name).mkdir() is None
    )
    assert first == same != other


def test_unigram_entropy_equals_a_hand_computed_one(tmp_path):
    # 1 occurs four times, 0 three times, 2 once: of eight tokens.
    shards = write_shard_set(tmp_path, [[[1, 1, 0], [1, 0]], [[2, 1, 0]]], vocab_size=5)
    expected = -(4 / 8 * math.log(4 / 8) + 3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8))
    assert unigram_entropy(shards) == pytest.approx(expected, rel=1e-12)
    # The first two tokens alone are both 1; the first three are 1, 1, 0.
    assert unigram_entropy(shards, max_tokens=2) == 0
    assert unigram_entropy(shards, max_tokens=3) == pytest.approx(math.log(3) - 2 / 3 * math.log(2), rel=1e-12)


def test_a_shard_set_reads_back_what_the_tokenize_stage_counted(tiny_shards):
    shards = ShardSet.open(tiny_shards)
    content = json.loads((tiny_shards / "manifest.json").read_bytes())["content"]
    assert len(shards.names) > 2
    assert sum(shards.documents) == content["documents"] == 240
    assert sum(len(shards.shard(i).tokens) for i in range(len(shards.names))) == content["tokens"]
