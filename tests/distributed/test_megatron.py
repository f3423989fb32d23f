"""Shards that Megatron-Core wrote train like our own."""

import json
import shutil

import pytest

from data_prep.shards import ShardSet
from tests.data_prep.test_megatron import rewritten_by_megatron
from tests.distributed.ranks import ROOT, metrics, pretrain

pytestmark = pytest.mark.ranks
FP32 = str(ROOT / "ds_configs" / "zero2_fp32.json")


def test_a_folder_of_megatrons_shards_trains_unchanged_with_the_losses_of_ours(write_recipe, tiny_shards, tmp_path):
    theirs = rewritten_by_megatron(ShardSet.open(tiny_shards), tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    ours = shutil.copytree(tiny_shards, tmp_path / "ours")
    losses = {}
    for folder in (ours, theirs):
        recipe = write_recipe("causal", data={"shards": str(folder)}, training={"max_steps": 3})
        shown = pretrain(1, FP32, recipe, tmp_path / f"run_{folder.name}")
        losses[folder.name] = [record["loss"] for record in metrics(tmp_path / f"run_{folder.name}")]
        lines = [line for line in shown.stdout.splitlines() if "could not be checked" in line]
        assert len(lines) == (folder is theirs)
    assert len(losses["ours"]) == 3 and losses["ours"] == losses["theirs"]
    assert {path.name: path.read_bytes() for path in theirs.iterdir() if path.is_file()} == before
    run = json.loads((tmp_path / "run_theirs" / "run.json").read_bytes())
    assert run["corpora"]["corpus"] == ShardSet.open(theirs).fingerprint
