"""Stop and resume on the same world size is bitwise the uninterrupted run, dropout on."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest

from tests.data_prep.faults import faulty
from tests.distributed.ranks import NO_DROPOUT, ds_config_with, metrics, pretrain, without_last_checkpoint

pytestmark = pytest.mark.ranks
NUMBERS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "samples")


def tensors(value, path=""):
    """(path, bytes) of every tensor in a nested structure, and the repr of every other leaf."""
    import torch

    if isinstance(value, torch.Tensor):
        yield path, hashlib.sha256(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{path}.{index}")
    elif isinstance(value, int | float | str | bool | None):
        yield path, repr(value)


def states(checkpoint: Path) -> dict[str, dict[str, str]]:
    """The weights, optimizer states and counters of every rank's files."""
    import torch

    return {
        path.name: dict(tensors(torch.load(path, map_location="cpu", weights_only=False)))
        for path in sorted(checkpoint.glob("*.pt"))
    }


@pytest.mark.parametrize(
    "ds_config", ["zero0_fp32.json", "zero1.json", "zero2.json", "zero3.json"], ids=lambda name: Path(name).stem
)
def test_resume_is_bitwise_equal(ds_config, write_recipe, tmp_path):
    recipe = write_recipe("mlm" if ds_config == "zero2.json" else "causal", optimizer={"ema_decay": 0.9})
    straight = tmp_path / "straight"
    pretrain(2, f"ds_configs/{ds_config}", recipe, straight)
    resumed = without_last_checkpoint(straight, tmp_path / "resumed", step=2)
    finished = pretrain(2, f"ds_configs/{ds_config}", recipe, resumed)
    assert "resumed   from" in finished.stdout and "after step 2" in finished.stdout
    for after, before in zip(metrics(resumed), metrics(straight), strict=True):
        assert {name: after[name] for name in NUMBERS} == {name: before[name] for name in NUMBERS}
    final = "checkpoints/step-00000004"
    expected, found = states(straight / final), states(resumed / final)
    assert expected and found == expected
    assert any(".ema" in name for of_file in expected.values() for name in of_file)
    assert expected != states(straight / "checkpoints/step-00000002"), "the comparison has to be able to fail"


@pytest.fixture(scope="module")
def finished_run(write_recipe, tmp_path_factory):
    """Four steps on one rank, without dropout, whose draws are a rank's own."""
    recipe = write_recipe("causal", model=NO_DROPOUT["causal"], schedule={"type": "constant"})
    run = tmp_path_factory.mktemp("run") / "run"
    pretrain(1, "ds_configs/zero2_fp32.json", recipe, run)
    return recipe, run


def test_a_finished_run_is_left_as_it_is(finished_run, tmp_path):
    recipe, run = finished_run
    before = (run / "metrics.jsonl").read_bytes()
    finished = pretrain(1, "ds_configs/zero2_fp32.json", recipe, run)
    assert "validation loss" in finished.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_flipped_byte_in_the_newest_checkpoint_is_named_and_the_one_before_is_taken(finished_run, tmp_path):
    recipe, run = finished_run
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    victim = next((damaged / "checkpoints" / "step-00000004").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    finished = pretrain(1, "ds_configs/zero2_fp32.json", recipe, damaged)
    assert f"warning: {victim} is damaged" in finished.stdout and "after step 2" in finished.stdout
    assert states(damaged / "checkpoints/step-00000004") == states(run / "checkpoints/step-00000004")


def test_another_recipe_is_refused_naming_the_field(finished_run):
    recipe, run = finished_run
    finished = pretrain(1, "ds_configs/zero2_fp32.json", recipe, run, "--optimizer.lr", "0.5", check=False)
    assert finished.status != 0
    assert len(finished.error_lines) == 1
    assert "optimizer.lr was 0.01, now 0.5" in finished.error_lines[0]
    assert "--allow_changed optimizer.lr" in finished.error_lines[0]


def test_more_ranks_and_other_stages_take_the_same_samples_and_give_the_same_losses(finished_run, tmp_path):
    """1 rank at ZeRO 2, then 4 at ZeRO 3, then 2 at ZeRO 0."""
    recipe, run = finished_run
    moved = without_last_checkpoint(run, tmp_path / "moved", step=2)
    zero3 = ds_config_with(tmp_path / "zero3.json", "zero2_fp32.json", zero_optimization={"stage": 3})
    shown = pretrain(4, str(zero3), recipe, moved, "--training.max_steps", "3").stdout
    assert "after step 2" in shown and "written by 1 rank at ZeRO stage 2 in fp32" in shown
    shown = pretrain(2, "ds_configs/zero0_fp32.json", recipe, moved, "--training.max_steps", "4").stdout
    assert "after step 3" in shown and "written by 4 ranks at ZeRO stage 3 in fp32" in shown
    for after, before in zip(metrics(moved), metrics(run), strict=True):
        assert all(after[name] == before[name] for name in ("step", "learning_rate", "tokens", "samples"))
        assert all(after[name] == pytest.approx(before[name], rel=2e-5) for name in ("loss", "grad_norm"))


def test_a_full_disk_in_a_save_costs_that_checkpoint_and_nothing_else(finished_run, tmp_path, monkeypatch):
    recipe, run = finished_run
    for name, value in faulty(tmp_path, "fsync", 20, "28").items():
        monkeypatch.setenv(name, value)
    shown = pretrain(2, "ds_configs/zero2_fp32.json", recipe, tmp_path / "run", "--checkpoint.every_steps", "1")
    lost = re.findall(r"checkpoint of step (\d) not saved: No space left on device; training goes on", shown.stdout)
    assert len(lost) == 1
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {f"step-0000000{step}" for step in range(1, 5)} - {f"step-0000000{lost[0]}"}
    for after, before in zip(metrics(tmp_path / "run"), metrics(run), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-5)


def test_two_deterministic_runs_are_bitwise_equal_and_profiled_steps_leave_a_trace(write_recipe, tmp_path):
    recipe = write_recipe("mlm")
    for name, flags in (("one", ()), ("two", ("--profile", "2:3"))):
        pretrain(2, "ds_configs/zero2.json", recipe, tmp_path / name, "--deterministic", *flags)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [[step[name] for name in NUMBERS] for step in one] == [[step[name] for name in NUMBERS] for step in two]
    final = "checkpoints/step-00000004"
    assert states(tmp_path / "one" / final) == states(tmp_path / "two" / final)
    traces = {path.name for path in (tmp_path / "two" / "profile").iterdir()}
    assert traces == {"rank_0.json.gz", "rank_1.json.gz"} and not (tmp_path / "one" / "profile").exists()
