"""What goes wrong in a run is found on all ranks alike, changes nothing, is written down, and ends as it should."""

import contextlib
import json
import os

import pytest

from pipeline.checkpoint import list_checkpoints
from pipeline.startup import hold
from pipeline.trace import traced
from tests.distributed.ranks import ROOT, ds_config_with, launch, metrics, run_ranks
from tests.distributed.started import FAULTY_RUN, Started, last_digests, last_step, lines

pytestmark = pytest.mark.ranks
FP32 = str(ROOT / "ds_configs" / "zero2_fp32.json")


def faulty(ranks, ds_config, recipe, output_dir, faults, *flags, check=True, start=run_ranks):
    return start(
        ranks, FAULTY_RUN, "--faults", json.dumps(faults), "--deepspeed_config", ds_config,
        "--recipe", recipe, "--output_dir", output_dir, *flags, check=check,
    )  # fmt: skip


# Of each rank, at both ends of the model and in the loss.
NANS = [
    {"rank": 0, "step": 2, "what": "nan loss"},
    {"rank": 1, "step": 3, "what": "nan gradient", "parameter": 0},
    {"rank": 0, "step": 5, "what": "nan gradient", "parameter": -1},
    {"rank": 1, "step": 6, "what": "nan loss"},
]


@pytest.mark.parametrize("stage", ["zero0_fp32.json", "zero1.json", "zero2.json", "zero3.json"])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank_and_is_written_down(stage, write_recipe, tmp_path):
    config = ds_config_with(tmp_path / "ds.json", stage, train_micro_batch_size_per_gpu=2)
    run = tmp_path / "run"
    recipe = write_recipe("causal", training={"max_steps": 7}, checkpoint={"every_steps": 0})
    shown = faulty(2, config, recipe, run, NANS).stdout
    bad = [fault["step"] for fault in NANS]
    for rank in (0, 1):
        steps = lines(run / "digests" / f"rank_{rank}.jsonl")
        fired = {record["step"]: record["fired"] for record in steps if record["fired"]}
        assert fired == {fault["step"]: [fault["what"]] for fault in NANS if fault["rank"] == rank}
        assert [record["step"] for record in steps if record["before"] == record["after"]] == bad
    incidents = lines(run / "incidents.jsonl")
    assert [record["step"] for record in incidents] == bad
    for fault, record in zip(NANS, incidents, strict=True):
        assert record["kind"] == "non_finite_" + fault["what"].removeprefix("nan ")
        if "loss" in fault["what"]:
            assert record["sites"] == [{"rank": fault["rank"], "micro_batch": m} for m in (0, 1)]
            # Micro-batch m of rank r is the (m x 2 + r)-th pair of the step's samples.
            first = 2 * fault["rank"]
            assert record["samples"] == [first, first + 1, first + 4, first + 5] and record["loss"] == "nan"
        else:
            assert record["sites"] == [] and record["samples"] == list(range(8)) and record["grad_norm"] == "nan"
        assert f"step {fault['step']:>6}  left out" in shown
    assert [record["step"] for record in metrics(run)] == [1, 4, 7]


def test_steps_that_stay_bad_take_the_run_back_and_past_their_samples(write_recipe, tmp_path):
    recipe = write_recipe("causal", training={"max_steps": 8}, checkpoint={"every_steps": 2})
    rolled, straight = tmp_path / "rolled", tmp_path / "straight"
    faults = [{"rank": 1, "step": step, "what": "nan loss", "once": True} for step in (5, 6)]
    flags = ("--faults.max_skips", 2, "--faults.on_skips", "rollback")
    shown = faulty(2, FP32, recipe, rolled, faults, *flags).stdout
    assert "2 steps in a row, up to 6, that were left out: back to step 4, past 16 samples" in shown
    assert "skipped   samples: 16 before step 5" in shown
    assert [record["kind"] for record in lines(rolled / "incidents.jsonl")] == 2 * ["non_finite_loss"] + ["rollback"]
    # The same samples passed over from the start, by a run in which nothing went wrong.
    faulty(2, FP32, recipe, straight, [], "--training.skip_samples", "{4: 16}")
    assert [(record["samples"], record["loss"]) for record in metrics(rolled)] == [
        (record["samples"], record["loss"]) for record in metrics(straight)
    ]
    assert [record["samples"] for record in metrics(rolled)] == [8, 16, 24, 32, 56, 64, 72, 80]
    assert last_digests(rolled) == last_digests(straight)
    ids = [record["consumed_as"] for record in traced(rolled, 5, None, text=False)]
    assert ids == list(range(48, 56)), "trace knows of it"


SLOWLY = {"rank": 0, "step": 0, "what": "sleep", "seconds": 0.2}


@pytest.fixture(scope="module")
def ends(write_recipe, tmp_path_factory):
    """(straight run, the same run ended in every way and started again each time, status and output of each end)."""
    folder = tmp_path_factory.mktemp("ends")
    run, straight = folder / "run", folder / "straight"
    recipe = write_recipe("causal", training={"max_steps": 60}, checkpoint={"every_steps": 3})
    faulty(2, FP32, recipe, straight, [], "--verify_every", 7)  # which changes nothing
    found = {}
    asked = [
        SLOWLY,
        {"rank": 0, "step": 3, "what": "touch save"},
        {"rank": 0, "step": 4, "what": "sleep", "seconds": 1.2},  # the file is looked for once a second
        {"rank": 1, "step": 7, "what": "SIGUSR1"},
    ]
    shown = faulty(2, FP32, recipe, run, asked, check=False)
    found["SIGUSR1"] = (shown.status, shown.stdout + shown.stderr, [path.name for path in list_checkpoints(run)])
    kills = {
        "stop": lambda started: (run / "stop").touch(),
        "rank": lambda started: started.ranks[1].kill(),
        "ranks": lambda started: [rank.kill() for rank in started.ranks],
        "launcher": lambda started: started.launcher.kill(),
        "front": lambda started: started.front.kill(),
    }
    for name, kill in kills.items():
        with Started(FP32, recipe, run, [SLOWLY]) as started:
            assert started.wait_for_steps(2), started.output.read_text()
            kill(started)
            status, left = started.finish()
        assert not left, f"of {name}"
        found[name] = (status, started.output.read_text(), [path.name for path in list_checkpoints(run)])
    assert last_step(run, 0) < 60, "all were ended under way"
    dies = {"rank": 1, "step": 58, "what": "SIGKILL", "once": True}
    shown = faulty(2, FP32, recipe, run, [dies], "--max_restarts", 1, start=launch)
    found["restarted"] = (shown.status, shown.stdout + shown.stderr, [])
    return straight, run, found


def test_asked_to_save_or_end_by_one_rank_all_do_so_behind_one_step(ends):
    _, run, found = ends
    status, shown, checkpoints = found["SIGUSR1"]
    assert status == 75 and "Traceback" not in shown and "ended on" in shown
    first, asked, *rest = (int(name.removeprefix("step-")) for name in checkpoints)
    assert first == 3 and asked in (4, 5) and rest == [6, 8]
    assert not (run / "save").exists()
    status, shown, checkpoints = found["stop"]
    assert status == 75 and "Traceback" not in shown and "ended on" in shown and not (run / "stop").exists()


def test_a_killed_rank_ends_the_run_with_a_status(ends):
    assert ends[2]["rank"][0] not in (0, None) and ends[2]["ranks"][0] not in (0, None)


def test_a_killed_launcher_has_the_ranks_save_and_leave(ends):
    """The fixture has checked that nothing outlives it. (`deepspeed` ends with 0 where its child is killed.)"""
    for name, before in (("launcher", "ranks"), ("front", "launcher")):
        assert int(ends[2][name][2][-1][5:]) > int(ends[2][before][2][-1][5:])
        assert "ended on its launcher was gone" in ends[2][name][1]


def test_a_rank_that_dies_is_started_again_within_the_same_command(ends):
    status, shown, _ = ends[2]["restarted"]
    assert status == 0 and "restart   1 of 1: a rank ended with status -9" in shown
    assert shown.count("resumed   from") == 2 and "done in" in shown


def test_however_a_run_was_ended_the_same_command_comes_to_the_same_end(ends):
    straight, run, _ = ends
    assert [(record["samples"], record["loss"], record["grad_norm"]) for record in metrics(run)] == [
        (record["samples"], record["loss"], record["grad_norm"]) for record in metrics(straight)
    ]
    assert last_digests(run) == last_digests(straight)


HANGS = {
    "a stopped rank": ({"rank": 1, "what": "SIGSTOP"}, "rank 1 did not answer"),
    "a stopped rank that keeps the store": ({"rank": 0, "what": "SIGSTOP"}, "rank 0, which keeps the group's store"),
    "a sleeping rank": ({"rank": 1, "what": "sleep", "seconds": 3600}, "the others wait for rank 1 at step 3"),
    "a loader that brings nothing": ({"rank": 1, "what": "no samples"}, "rank 1 in samples"),
}


def test_a_run_that_hangs_ends_naming_the_rank_and_leaves_its_stacks(write_recipe, tmp_path):
    recipe = write_recipe("causal", checkpoint={"every_steps": 0})
    with contextlib.ExitStack() as stack:
        runs = {}
        for number, (name, (fault, _)) in enumerate(HANGS.items()):
            flags = ("--faults.hang_seconds", 15)
            started = Started(FP32, recipe, tmp_path / str(number), [{**fault, "step": 3}], *flags)
            runs[name] = stack.enter_context(started)
        for started in runs.values():
            assert started.wait_for_steps(2), started.output.read_text()
        ends = {name: started.finish() for name, started in runs.items()}
    for name, started in runs.items():
        status, left = ends[name]
        assert status not in (0, None) and not left, name
        shown = started.output.read_text()
        assert "error: no progress for" in shown and HANGS[name][1] in shown, shown
        stacks = [path.read_text() for path in started.run.glob("logs/rank_*.stacks")]
        assert len(stacks) == (1 if "stopped" in name else 2), name
        assert any("all_reduce" in stack for stack in stacks), "of a rank that waits"


def test_two_runs_do_not_share_a_folder(write_recipe, tmp_path):
    """That the lock of a run that was killed is free, the kills above have shown."""
    with hold(tmp_path / "run"):
        shown = faulty(1, FP32, write_recipe("causal"), tmp_path / "run", [], check=False)
    assert shown.status == 1 and shown.error_lines[0].startswith(f"error: {tmp_path}/run: process {os.getpid()} on")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "logs"}


def test_a_gradient_that_does_not_repeat_ends_the_run_naming_the_rank(write_recipe, tmp_path):
    recipe = write_recipe("mlm", checkpoint={"every_steps": 0}, training={"max_steps": 6})
    flip = {"rank": 1, "step": 4, "what": "flip gradient", "parameter": 3}
    config = ds_config_with(
        tmp_path / "ds.json", "zero1.json", train_micro_batch_size_per_gpu=2, bf16={"enabled": False}
    )
    shown = faulty(2, config, recipe, tmp_path / "run", [flip], "--verify_every", 2, check=False)
    assert shown.status == 1 and len(shown.error_lines) == 1 and "Traceback" not in shown.stderr
    assert "error: rank 1 on" in shown.error_lines[0] and "two different gradients" in shown.error_lines[0]
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3], "step 2 was found to repeat"
