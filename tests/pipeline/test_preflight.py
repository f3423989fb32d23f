"""What is known before a run: hosts that differ, shards that are not whole, disks without room."""

import shutil
from types import SimpleNamespace

import pytest

from data_prep.shards import ShardSet
from pipeline import preflight
from pipeline.preflight import check_disk, check_shards, describe_copies, describe_host, difference
from pipeline.recipe import check_recipe
from pipeline.startup import RankError


def recipe(**checkpoint):
    return check_recipe(
        {
            "objective": "causal",
            "model": {"config": "demo-gpt"},
            "data": {"shards": "s", "tokenizer": "t", "sequence_length": 32},
            "training": {"global_batch_size": 8, "max_steps": 4},
            "optimizer": {"lr": 1e-3},
            "checkpoint": checkpoint,
        },
        "test",
    )


def test_the_host_that_differs_is_named_with_what_and_how():
    first = describe_host(recipe(), {"train_batch_size": 8})
    assert {"commit", "recipe and ds_config", "python", "torch", "deepspeed"} <= set(first)
    assert difference([("a", first), ("b", dict(first))]) is None
    older = {**first, "torch": "2.11.0"}
    assert difference([("a", first), ("b", first), ("c", older)]) == f"c has torch 2.11.0, a has {first['torch']}"
    other = describe_host(recipe(), {"train_batch_size": 16})
    assert "b has recipe and ds_config" in difference([("a", first), ("b", other)])


def test_nccl_settings_are_compared_but_for_those_of_a_hosts_own_devices():
    mine = {
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "mlx5_0",
        "A": "b",
    }
    first = describe_host(recipe(), {}, mine)
    assert first["NCCL settings"] == "NCCL_ALGO=Ring, NCCL_PROTO=Simple"
    assert (
        difference([("a", first), ("b", describe_host(recipe(), {}, {**mine, "NCCL_SOCKET_IFNAME": "eth7"}))]) is None
    )
    without = describe_host(recipe(), {}, {})
    assert difference([("a", first), ("b", without)]) == (
        "b has NCCL settings none, a has NCCL_ALGO=Ring, NCCL_PROTO=Simple"
    )
    assert difference([("a", without), ("b", first)]) == (
        "b has NCCL settings NCCL_ALGO=Ring, NCCL_PROTO=Simple, a has none"
    )


def test_copies_of_other_shards_are_named():
    def data(fingerprint):
        corpus = SimpleNamespace(name="wiki", shards=SimpleNamespace(fingerprint=fingerprint))
        return SimpleNamespace(corpora=[corpus], tokenizer=SimpleNamespace(fingerprint="t" * 64))

    described = [describe_copies(data(letter * 64)) for letter in "aab"]
    assert difference(list(zip("xyz", described, strict=True))) == (
        "z has data.shards wiki of fingerprint bbbbbbbbbbbb, x has aaaaaaaaaaaa"
    )


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_not_whole_is_named(tiny_shards, tmp_path, damage):
    shards = ShardSet.open(shutil.copytree(tiny_shards, tmp_path / "s"))
    data = SimpleNamespace(corpora=[SimpleNamespace(shards=shards)])
    assert check_shards(data) == 3 * len(shards.names)
    victim = shards.folder / f"{shards.names[2]}.idx"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-8])
    else:
        victim.unlink()
    with pytest.raises(RankError, match=rf"{victim.name} (has [\d,]+ bytes, expected|is missing)"):
        check_shards(data)


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 10**9))
    assert "checkpoints take up to 9.6 GB" in check_disk(recipe(keep_last=5), tmp_path, 100_000_000)
    with pytest.raises(RankError, match=r"has 10\.0 GB free, but 6 checkpoints and one .* up to 11\.2 GB"):
        check_disk(recipe(keep_last=6), tmp_path, 100_000_000)
