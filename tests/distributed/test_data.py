"""What a run consumes: blends, ramps, pairs and curricula on real ranks, and how they go on when the run does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.trace import traced
from tests.distributed.ranks import (
    NO_DROPOUT,
    ROOT,
    ds_config_with,
    metrics,
    pretrain,
    relative_difference,
    without_last_checkpoint,
)

pytestmark = pytest.mark.ranks
FP32 = "ds_configs/zero2_fp32.json"


@pytest.fixture(scope="module")
def two_corpora(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {name: str(shutil.copytree(tiny_shards, folder / name)) for name in ("prose", "code")}


@pytest.fixture(scope="module")
def blended(write_recipe, two_corpora, tmp_path_factory):
    """(recipe, run) of a ramp and a blend that changes after two steps of four."""
    weights = {0: {"prose": 0.75, "code": 0.25}, 2: {"prose": 0.25, "code": 0.75}}
    recipe = write_recipe(
        "causal",
        data={"shards": two_corpora, "weights": weights},
        training={"global_batch_size": {0: 4, 2: 8}},
        evaluation={"every_steps": 2},
        checkpoint={"every_steps": 1},
    )
    run = tmp_path_factory.mktemp("blended") / "run"
    pretrain(2, FP32, recipe, run)
    return recipe, run


def test_losses_and_epochs_of_each_corpus_are_in_the_metrics_and_in_tensorboard(blended):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = blended
    steps = metrics(run)
    assert [step["samples"] for step in steps] == [4, 8, 16, 24]
    assert [step["tokens"] for step in steps] == [4 * 32, 4 * 32, 8 * 32, 8 * 32]
    samples = json.loads((run / "run.json").read_text())["samples"]["train"]
    for step, (prose, code) in zip(steps, [(3, 1), (6, 2), (8, 8), (10, 14)], strict=True):
        found = step["corpora"]
        assert found["prose"]["epochs"] == prose / samples["prose"]
        assert found["code"]["epochs"] == code / samples["code"]
    for step, (prose, code) in zip(steps, [(3, 1), (3, 1), (2, 6), (2, 6)], strict=True):
        # Samples are equally long, so the loss is the mean of the corpora's, weighted by their samples.
        mean = (prose * step["corpora"]["prose"]["loss"] + code * step["corpora"]["code"]["loss"]) / (prose + code)
        assert relative_difference(mean, step["loss"]) < 1e-6
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("prose", "code"):
        shown = {event.step: event.value for event in events.Scalars(f"loss/train/{name}")}
        assert shown == pytest.approx({step["step"]: step["corpora"][name]["loss"] for step in steps})
        assert len(events.Scalars(f"epochs/{name}")) == 4 and len(events.Scalars(f"loss/validation/{name}")) == 3


def test_a_ramp_and_a_blend_resume_bitwise_in_their_middle(blended, tmp_path):
    recipe, run = blended
    resumed = without_last_checkpoint(run, tmp_path / "resumed", step=1)
    pretrain(2, FP32, recipe, resumed)
    for after, before in zip(metrics(resumed), metrics(run), strict=True):
        for name in ("step", "loss", "grad_norm", "samples", "tokens", "corpora"):
            assert after[name] == before[name]


def test_changed_batch_sizes_weights_and_corpora_take_over_where_the_run_goes_on(
    blended, tmp_path, two_corpora, tiny_shards
):
    recipe, run = blended
    resumed = without_last_checkpoint(run, tmp_path / "resumed", step=3)
    raw = yaml.safe_load(Path(recipe).read_text())
    raw["data"]["shards"]["web"] = str(tiny_shards)
    raw["data"]["weights"] = {"prose": 0.0, "code": 0.5, "web": 0.5}
    raw["training"] |= {"global_batch_size": 12, "max_steps": 5}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(raw))
    pretrain(2, FP32, changed, resumed)
    before, after = metrics(run), metrics(resumed)
    assert [step["samples"] for step in after] == [4, 8, 16, 28, 40]
    for old, new in zip(before[:3], after[:3], strict=True):
        assert new["loss"] == old["loss"]
    assert after[3]["corpora"]["prose"]["epochs"] == after[4]["corpora"]["prose"]["epochs"] > 0
    record = json.loads((resumed / "run.json").read_text())["recipe"]
    assert record["training"]["global_batch_size"] == {"0": 4, "2": 8, "3": 12}
    assert [row["consumed_as"] for row in traced(resumed, 4, None, text=False)] == list(range(16, 28))
    # What came before is traced as it was.
    for step in (1, 2, 3):
        rows = [list(traced(folder, step, None, text=False)) for folder in (run, resumed)]
        assert [row["documents"] for row in rows[0]] == [row["documents"] for row in rows[1]]


def test_a_corpus_that_is_gone_or_changed_is_refused(blended, tmp_path):
    recipe, run = blended
    raw = yaml.safe_load(Path(recipe).read_text())
    del raw["data"]["shards"]["code"]
    raw["data"]["weights"] = {"prose": 1.0}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(raw))
    resumed = without_last_checkpoint(run, tmp_path / "resumed", step=2)
    finished = pretrain(2, FP32, changed, resumed, check=False)
    assert finished.status != 0
    assert "code" in finished.error_lines[0]


@pytest.fixture(scope="module")
def curriculum(write_recipe):
    """A recipe with everything that is drawn by sample: goldfish, growing stretches and dropped tokens."""
    model = {"base": "demo-gpt", "n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 64}
    return write_recipe(
        "causal",
        model={**model, **NO_DROPOUT["causal"]},
        data={"packing": "best_fit"},
        causal={"goldfish_k": 4, "goldfish_context": 3},
        curriculum={"start_length": 8, "length_steps": 6, "token_drop_start": 16, "token_drop_steps": 6},
    )


def test_a_curriculum_does_not_know_the_ranks_and_resumes(curriculum, tmp_path):
    whole = ds_config_with(tmp_path / "whole.json", "zero0_fp32.json", train_micro_batch_size_per_gpu=8)
    spread = ds_config_with(tmp_path / "spread.json", "zero2_fp32.json", train_micro_batch_size_per_gpu=2)
    pretrain(1, str(whole), curriculum, tmp_path / "one")
    pretrain(2, str(spread), curriculum, tmp_path / "two")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["tokens"] == two["tokens"] < 8 * 32
        assert relative_difference(two["loss"], one["loss"]) < 1e-5
        assert relative_difference(two["grad_norm"], one["grad_norm"]) < 1e-4
    resumed = without_last_checkpoint(tmp_path / "two", tmp_path / "resumed", step=2)
    pretrain(2, str(spread), curriculum, resumed)
    assert [s["loss"] for s in metrics(resumed)] == [s["loss"] for s in metrics(tmp_path / "two")]


def test_next_sentence_prediction_trains_and_leaves_a_masked_lm(write_recipe, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoModelForNextSentencePrediction

    from pipeline.export import export

    recipe = write_recipe("mlm", data={"packing": "nsp"}, masking={"unit": "word"})
    pretrain(2, "ds_configs/zero2.json", recipe, tmp_path / "run")
    for step in metrics(tmp_path / "run"):
        assert 0.3 < step["pair_loss"] < 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["validation"]["pair_loss"] > 0 for line in lines if "validation" in line)
    export(tmp_path / "run", tmp_path / "exported")
    for auto in (AutoModelForMaskedLM, AutoModelForNextSentencePrediction):
        _, info = auto.from_pretrained(tmp_path / "exported", output_loading_info=True)
        assert not info["missing_keys"]


def test_a_shard_that_is_cut_off_under_a_run_ends_it_naming_the_shard(write_recipe, tiny_shards, tmp_path):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    recipe = write_recipe(
        "causal",
        data={"shards": str(shards)},
        training={"max_steps": 100_000},
        schedule={"type": "constant"},
        checkpoint={"every_steps": 0},
    )
    command = [sys.executable, "pipeline/pretrain.py", "--deepspeed_config", FP32, "--recipe", str(recipe)]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    log = tmp_path / "run" / "metrics.jsonl"
    while (not log.exists() or len(log.read_bytes().splitlines()) < 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in shards.glob("*.bin"):
        os.truncate(path, path.stat().st_size // 3)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (
        line.startswith("error: rank 0: ")
        and f"{shards}/" in line
        and ".bin, bytes " in line
        and "nothing of it is trained on" in line
    )
    losses = [step["loss"] for step in metrics(tmp_path / "run")]
    assert losses and all(loss > 0 for loss in losses)
