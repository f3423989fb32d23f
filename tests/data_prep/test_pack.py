"""Plans: hand-worked numbers, and a held-out split that never moves."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.durable import write_json
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.pack import Split, make_plan, plan_path, read_plan, write_plan
from data_prep.shards import ShardSet, ShardWriter


def shard_set(folder, lengths: list[list[int]]) -> ShardSet:
    """Shards of documents of these lengths (tokens)."""
    files, shards = {}, []
    for index, documents in enumerate(lengths):
        with ShardWriter(folder / str(index), np.dtype("<u2")) as writer:
            for length in documents:
                writer.append(np.zeros(length, dtype=np.uint16))
        files |= writer.files
        shards.append({"name": str(index), "documents": writer.documents, "tokens": writer.tokens})
    tokenizer = {"fingerprint": "", "vocab_size": 9, "end_of_document": 0}
    Manifest("shards", {"command": "test"}, files, {"shards": shards, "tokenizer": tokenizer}).write(folder)
    return ShardSet.open(folder)


def test_a_plan_has_the_numbers_worked_by_hand(tmp_path):
    # A quarter is held out: of 5 documents 1 (int 1.25), of 5 + 4 in all 2 (int 2.25), so 1 of each shard.
    shards = shard_set(tmp_path, [[10, 20, 5, 7, 11], [30, 2, 9, 14]])
    plan = make_plan(shards, "causal", 16, 0.25)
    # Training: 10 + 20 + 5 + 7 = 42 and 30 + 2 + 9 = 41 tokens; a causal sample is 16 and one more for the last target.
    assert plan.train == Split((0, 0), (4, 3), (0, 0), (42, 41), samples=(83 - 1) // 16)
    assert plan.validation == Split((4, 3), (5, 4), (42, 41), (11, 14), samples=(25 - 1) // 16)
    assert (plan.stride, plan.train.samples, plan.validation.samples) == (16, 5, 1)
    # A masked-LM sample of 16 takes 14 tokens, between [CLS] and [SEP].
    masked = make_plan(shards, "mlm", 16, 0.25)
    assert (masked.stride, masked.train.samples, masked.validation.samples) == (14, 83 // 14, 25 // 14)
    assert masked.train.tokens == plan.train.tokens


def test_the_last_causal_sample_has_its_last_target(tmp_path):
    assert make_plan(shard_set(tmp_path, [[16]]), "causal", 15, 0).train.samples == 1
    with pytest.raises(UserError, match="16 training tokens give no sample of 16 tokens"):
        make_plan(ShardSet.open(tmp_path), "causal", 16, 0)


shard_lengths = st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=6)


@given(lengths=shard_lengths, more=shard_lengths, fraction=st.floats(0, 0.9))
@settings(max_examples=25, deadline=None)
def test_training_and_held_out_documents_are_disjoint_complete_and_stay_when_shards_join(
    lengths, more, fraction, tmp_path_factory
):
    lengths = [[100], *lengths]
    plan = make_plan(shard_set(tmp_path_factory.mktemp("a"), lengths), "mlm", 8, fraction)
    for split in (plan.train, plan.validation):
        for index, documents in enumerate(lengths):
            first, end = split.first_document[index], split.end_document[index]
            assert split.first_token[index] == sum(documents[:first])
            assert split.tokens[index] == sum(documents[first:end])
        assert split.samples == sum(split.tokens) // 6
    assert plan.train.first_document == (0,) * len(lengths)
    assert plan.train.end_document == plan.validation.first_document
    assert plan.validation.end_document == tuple(map(len, lengths))
    held_out = sum(plan.validation.end_document) - sum(plan.validation.first_document)
    assert held_out == int(sum(map(len, lengths)) * fraction)

    longer = make_plan(shard_set(tmp_path_factory.mktemp("b"), lengths + more), "mlm", 8, fraction)
    for name in ("first_document", "end_document", "first_token", "tokens"):
        assert getattr(longer.train, name)[: len(lengths)] == getattr(plan.train, name)
        assert getattr(longer.validation, name)[: len(lengths)] == getattr(plan.validation, name)


def test_a_plan_is_read_back_for_its_own_shards_and_settings_only(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    shards, other = shard_set(tmp_path / "one", [[50, 50]]), shard_set(tmp_path / "other", [[50, 49]])
    plan = make_plan(shards, "causal", 8, 0.5)
    assert read_plan(shards, "causal", 8, 0.5) is None
    path = write_plan(shards.folder, plan)
    assert read_plan(shards, "causal", 8, 0.5) == plan
    for settings_ in (("mlm", 8, 0.5), ("causal", 9, 0.5), ("causal", 8, 0.50000001)):
        assert read_plan(shards, *settings_) is None
    copy = plan_path(other.folder, "causal", 8, 0.5)
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert read_plan(other, "causal", 8, 0.5) is None


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}"])
def test_a_damaged_plan_is_an_error_naming_it(tmp_path, damage):
    shards = shard_set(tmp_path, [[50, 50]])
    path = write_plan(tmp_path, make_plan(shards, "causal", 8, 0.5))
    path.write_bytes(damage)
    with pytest.raises(UserError, match="is damaged") as error:
        read_plan(shards, "causal", 8, 0.5)
    assert str(path) in str(error.value)
    write_json(path, {"version": 1, "shards_fingerprint": shards.fingerprint, "train": [], "validation": {}})
    with pytest.raises(UserError, match="is damaged"):
        read_plan(shards, "causal", 8, 0.5)


@pytest.mark.parametrize(
    ("length", "fraction", "message"),
    [
        (4, 0.1, "sequence_length is 4, expected at least 8"),
        (64, 1, "validation_fraction is 1.0, expected 0 <= fraction < 1"),
        (64, -0.1, "validation_fraction is -0.1"),
        (64, "nan", "validation_fraction is nan"),
        (100_000, 0.1, "training tokens give no sample of 100000 tokens; take a smaller sequence_length or more text"),
    ],
)
def test_what_cannot_be_packed_is_refused(tiny_shards, tmp_path, data_prep, length, fraction, message):
    shutil.copytree(tiny_shards, tmp_path / "s")
    flags = ["--objective", "causal", "--sequence_length", length, "--validation_fraction", fraction]
    assert message in data_prep("pack", "--shards", tmp_path / "s", *flags).error
    assert not (tmp_path / "s/samples").exists()


def test_the_command_writes_the_plan_once_and_prints_its_numbers(tiny_shards, tmp_path, data_prep):
    shutil.copytree(tiny_shards, tmp_path / "s")
    command = ["pack", "--shards", tmp_path / "s", "--objective", "mlm", "--sequence_length", 66]
    command += ["--validation_fraction", 0.05]
    first = data_prep(*command)
    (path,) = (tmp_path / "s/samples").iterdir()
    plan = json.loads(path.read_bytes())
    assert plan["train"]["samples"] == sum(plan["train"]["tokens"]) // 64
    assert sum(plan["validation"]["end_document"]) - sum(plan["validation"]["first_document"]) == 12
    assert f"{plan['train']['samples']:,} samples" in first.stdout and "12 documents" in first.stdout
    modified = path.stat().st_mtime_ns
    assert "up to date" in data_prep(*command).stdout
    assert path.stat().st_mtime_ns == modified
