"""Steps to trace, and whose mistake it is."""

import gzip
import json

import pytest

from data_prep.errors import UserError
from pipeline import pretrain
from pipeline.profiling import Profiler, parse_steps
from pipeline.startup import RankError


@pytest.mark.parametrize("text", ["5", "5:", "0:3", "7:5", "a:b", "1:2:3"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=f"--profile is '{text}', expected A:B"):
        parse_steps(text)


@pytest.mark.parametrize(("last_step", "ends_at"), [(100, 6), (5, 5)])
def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path, last_step, ends_at):
    import torch
    from torch.profiler import record_function

    profiler = Profiler(parse_steps("4:6"), tmp_path, 3)
    paths = []
    for step in range(1, last_step + 1 if last_step < 10 else 9):
        profiler.before(step)
        with record_function(f"step {step}"):
            torch.ones(8).sum()
        paths.append(profiler.after(step, last_step))
    assert [number + 1 for number, path in enumerate(paths) if path] == [ends_at]
    with gzip.open(tmp_path / "profile/rank_3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"step {step}" for step in range(1, 9)} & names == {f"step {step}" for step in range(4, ends_at + 1)}


@pytest.mark.parametrize(
    ("local_rank", "error", "shown"),
    [
        ("0", UserError("no such recipe"), "error: no such recipe\n"),
        ("1", UserError("no such recipe"), ""),
        ("1", RankError("a shard is gone"), "error: rank 5: a shard is gone\n"),
    ],
)
def test_a_mistake_is_said_once_a_host_and_what_one_rank_met_by_that_rank(
    monkeypatch, capsys, local_rank, error, shown
):
    def fails(*_):
        raise error

    monkeypatch.setattr(pretrain, "run", fails)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert pretrain.main(["--deepspeed_config", "x.json"]) == 1
    assert capsys.readouterr().err == shown
