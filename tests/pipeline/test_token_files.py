"""Shards that change under a run: it stops, naming the shard and its bytes, and trains on nothing of it."""

import os
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards import ShardSet
from pipeline import token_files
from pipeline.token_files import TokenFiles


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return ShardSet.open(shutil.copytree(tiny_shards, tmp_path / "shards"))


def all_tokens(shards):
    return np.concatenate([shards.shard(index).tokens for index in range(len(shards.names))])


def read(files, *stretches):
    start, length = (np.array(values, dtype=np.int64) for values in zip(*stretches, strict=True))
    out = np.zeros(int(length.sum()), dtype=files.dtype)
    files.read(start, length, out, np.cumsum(length) - length)
    return out


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_stretches_are_the_tokens_of_the_set_over_the_ends_of_shards(data, tiny_shards):
    shards = ShardSet.open(tiny_shards)
    tokens = all_tokens(shards)
    stretch = st.integers(0, len(tokens) - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(0, len(tokens) - start))
    )
    stretches = data.draw(st.lists(stretch, min_size=1, max_size=6))
    expected = np.concatenate([tokens[start : start + length] for start, length in stretches])
    assert np.array_equal(read(TokenFiles(shards), *stretches), expected)


def test_more_shards_than_may_be_open_are_read(shards, monkeypatch):
    monkeypatch.setattr(token_files, "_MOST_OPEN", 2)
    files, tokens = TokenFiles(shards), all_tokens(shards)
    assert len(shards.names) > 2
    starts = np.linspace(0, len(tokens) - 10, 40).astype(int)
    for _ in range(2):
        found = read(files, *((int(start), 10) for start in starts))
        assert np.array_equal(found, np.concatenate([tokens[start : start + 10] for start in starts]))
        assert len(files._open) <= 2
    files.close()


def test_documents_are_named_with_their_bytes(shards):
    files = TokenFiles(shards)
    shard = shards.shard(1)
    base = shards.tokens[0]
    begin, end = shard.document_offset(2), shard.document_offset(3)
    first, second = files.documents(base + end - 3, 5)
    assert (first.shard, first.document, first.tokens) == (shard.path, 2, 3)
    assert (first.first, first.document_tokens) == (end - begin - 3, end - begin)
    assert (first.begin_byte, first.end_byte) == (2 * (end - 3), 2 * end)
    assert (second.document, second.first, second.tokens) == (3, 0, 2)
    raw = shard.path.read_bytes()[first.begin_byte : second.end_byte]
    assert np.frombuffer(raw, "<u2").tolist() == read(files, (base + end - 3, 5)).tolist()


def damage_cut(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_changed(path):
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(b"\1\0")


def damage_gone(path):
    path.rename(path.with_suffix(".away"))


def damage_replaced(path):
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "it ends before byte|bytes, and had"),
        (damage_changed, "its content was changed after it was opened"),
        (damage_gone, "No such file"),
        (damage_replaced, "another file has taken its name"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_shard_that_changes_under_a_run_ends_it_naming_shard_and_bytes(shards, monkeypatch, damage, message):
    files = TokenFiles(shards)
    start = shards.tokens[0]
    path = shards.shard(1).path
    before = read(files, (start + 5, 7))
    assert np.array_equal(before, shards.shard(1).tokens[5:12])
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    damage(path)
    monkeypatch.setattr(token_files, "_LOOK_SECONDS", 0.0)
    with pytest.raises(UserError) as error:
        read(files, (start + shards.tokens[1] - 7, 7))
    first, last = 2 * (shards.tokens[1] - 7), 2 * shards.tokens[1]
    assert f"{path}, bytes {first:,} to {last:,}: " in str(error.value)
    assert any(part in str(error.value) for part in message.split("|"))
    assert "nothing of it is trained on" in str(error.value)


def test_what_cannot_be_read_is_an_error_with_its_place(shards):
    """A disk that fails: EIO, which a memory map would turn into a signal."""
    files = TokenFiles(shards)

    read(files, (0, 1))
    os.dup2(os.open("/proc/self/mem", os.O_RDONLY), files._open[0].descriptor)  # nothing is mapped at its beginning
    with pytest.raises(UserError, match=r"000000\.bin, bytes 20 to 30: Input/output error"):
        read(files, (10, 5))


def test_a_shard_that_is_not_the_manifests_is_refused_when_it_is_first_read(shards):
    path = shards.folder / f"{shards.names[2]}.bin"
    path.write_bytes(path.read_bytes() + b"\0\0")
    files = TokenFiles(shards)
    with pytest.raises(UserError, match="the shard is damaged"):
        read(files, (sum(shards.tokens[:2]), 3))
