"""What a run leaves behind, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed.ranks import ROOT, ds_config_with, free_port, launch, metrics, pretrain

pytestmark = pytest.mark.ranks
FP32 = str(ROOT / "ds_configs" / "zero2_fp32.json")


@pytest.fixture(scope="module")
def finished(write_recipe, tmp_path_factory):
    """(recipe, run, what the terminal showed) of a short run on two ranks."""
    recipe = write_recipe("causal", evaluation={"every_steps": 2, "histograms_every_steps": 2})
    run = tmp_path_factory.mktemp("finished") / "run"
    return recipe, run, pretrain(2, FP32, recipe, run, start=launch)


def test_metrics_have_every_field_of_every_step(finished):
    _, run, _ = finished
    steps = metrics(run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert set(record) == {
            "step", "loss", "learning_rate", "grad_norm", "tokens", "samples", "step_seconds", "data_wait_seconds",
            "tokens_per_second", "memory_bytes", "mfu",
        }  # fmt: skip
        assert record["samples"] == 8 * record["step"] and record["tokens"] == 8 * 32
        assert 0 <= record["data_wait_seconds"] <= record["step_seconds"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 2, 4]
    shares = [line["validation"]["accuracy"] for line in lines if "validation" in line]
    assert 0 <= shares[0] < shares[-1] < 1


def test_tensorboard_shows_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, _ = finished
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag, name in (("loss/train", "loss"), ("optimizer/learning_rate", "learning_rate")):
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx({record["step"]: record[name] for record in metrics(run)})
    assert [event.step for event in events.Scalars("loss/validation")] == [0, 2, 4]
    assert len(list((run / "tensorboard").iterdir())) == 1, "rank 0 alone writes"


def test_tensorboard_has_texts_hyperparameters_a_layout_and_histograms(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    _, run, _ = finished
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    for number in range(2):
        shown = events.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in shown] == [0, 2, 4]
        assert all("continued" in event.tensor_proto.string_val[0].decode() for event in shown)
    assert events.Tensors("custom_scalars__config__")
    start, end = (
        HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/session_{what}_info").plugin_data.content)
        for what in ("start", "end")
    )
    assert start.session_start_info.hparams["lr"].number_value == 1e-2
    assert start.session_start_info.hparams["engine"].string_value == "ZeRO 2, fp32, AdamW"
    assert end.session_end_info.status == 1, "success"
    assert [event.step for event in events.Histograms("weights/transformer.h.0.mlp.c_fc.weight")] == [2, 4]
    assert [event.step for event in events.Scalars("update_norm/transformer.wte.weight")] == [2, 4]


def test_what_the_ds_config_monitors_gets_the_same_numbers(finished, tmp_path):
    recipe, _, _ = finished
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    monitored = ds_config_with(tmp_path / "ds.json", "zero2_fp32.json", csv_monitor=section)
    pretrain(1, str(monitored), recipe, tmp_path / "run")
    for tag, name in (("loss_train", "loss"), ("throughput_tokens_per_second", "tokens_per_second")):
        rows = [line.split(",") for line in (tmp_path / "csv" / f"{tag}.csv").read_text().splitlines()[1:]]
        assert {int(step): float(value) for step, value in rows} == pytest.approx(
            {record["step"]: record[name] for record in metrics(tmp_path / "run")}
        )
    assert len((tmp_path / "csv" / "loss_validation.csv").read_text().splitlines()) == 4


def test_the_terminal_says_what_runs_and_what_came_of_it(finished):
    _, run, shown = finished
    assert "global batch 8 = micro-batch 4 x accumulation 1 x 2 ranks, 256 tokens a step" in shown.stdout
    assert "ZeRO 2, fp32, AdamW on 2 x cpu" in shown.stdout
    for phase in ("imports", "data", "model", "engine", "first step"):
        assert phase in next(line for line in shown.stdout.splitlines() if line.startswith("start"))
    assert "memory    0.00 GB of weights" in shown.stdout and "time      said after the first steps" in shown.stdout
    assert "validation loss" in shown.stdout and "unigram entropy" in shown.stdout
    assert f"tensorboard --logdir {run}/tensorboard" in shown.stdout
    assert (run / "logs" / "rank_0.log").exists() and (run / "logs" / "rank_1.log").exists()


def test_a_dry_run_says_what_can_be_known_and_leaves_nothing(finished, tmp_path):
    recipe, _, _ = finished
    shown = pretrain(2, FP32, recipe, tmp_path / "dry", "--dry_run", start=launch).stdout
    for line in (
        "shards    18 files are there",
        "disk ",
        "network   all-reduce of 16 MiB",
        "ranks     a matrix product",
    ):
        assert line in shown
    assert "random tokens with its update" in shown and "nothing was trained and nothing saved" in shown
    assert {path.name for path in (tmp_path / "dry").iterdir()} == {"logs"}


def test_old_checkpoints_are_pruned_and_all_have_final_names(finished):
    _, run, _ = finished
    names = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"step-00000002", "step-00000004"}
    assert not list(run.rglob("*.partial*"))


def test_ctrl_c_leaves_everything_whole_and_the_same_command_finishes_the_same_run(finished, tmp_path):
    recipe, _, _ = finished
    run = tmp_path / "run"
    slow = yaml.safe_load(Path(recipe).read_text())
    slow["checkpoint"]["every_steps"] = 1
    slow["training"]["max_steps"] = 4000
    slow["schedule"] = {"type": "constant", "warmup_steps": 2}
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(slow))
    command = [sys.executable, "pipeline/pretrain.py", "--deepspeed_config", FP32, "--recipe", str(path)]
    process = subprocess.Popen([*command, "--output_dir", str(run)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list((run / "checkpoints").glob("step-????????"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "stopped; the same command goes on" in errors
    done = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-????????"))
    end = str(done + 3)
    again = subprocess.run(
        [*command, "--output_dir", str(run), "--training.max_steps", end], cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert f"after step {done}" in again.stdout
    assert [record["step"] for record in metrics(run)] == list(range(1, done + 4))


def test_the_demo_makes_its_own_data_when_it_is_missing(tmp_path):
    """The bare command in a fresh checkout: corpus, tokenizer, shards and a model, on a smaller corpus and model."""
    for name in ("pipeline", "data_prep", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = yaml.safe_load((ROOT / "data_prep" / "jobs" / "demo.yaml").read_text())
    job["builtin_corpus"]["max_megabytes"] = 0.4
    job["train_tokenizer"]["vocab_size"] = 1024
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["pipeline/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json", "--data.prepare", "job.yaml"]
    command += ["--training.max_steps", "2", "--model.config.n_layer", "1", "--model.config.n_embd", "48"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "data/demo/shards is missing: making it with job.yaml" in done.stdout
    assert (tmp_path / "data" / "demo" / "shards" / "manifest.json").exists()
    assert len(metrics(tmp_path / "runs" / "demo-gpt")) == 2
    weights = torch.load(
        next((tmp_path / "runs/demo-gpt/checkpoints").rglob("mp_rank_00_model_states.pt")), weights_only=False
    )["module"]
    assert weights["transformer.wte.weight"].shape == (1024, 48)
