"""A checkpoint is whole or not there, whatever happens at whatever operation, and a damaged one is found and named.

One rank saves a made engine's states, so that thousands of trials take seconds; tests/distributed has real ones.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from data_prep import durable
from data_prep.errors import UserError
from pipeline import checkpoint
from pipeline.checkpoint import CHECKPOINTS, MANIFEST_NAME, Sources, find, list_checkpoints
from pipeline.checkpointer import Checkpointer, Due, HostCopies, write_state
from pipeline.recipe import CheckpointSection
from pipeline.startup import World
from tests.data_prep import faults

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world():
    """One rank, whose hundreds of checkpointers share a process group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "new_group", lambda **_: distributed.group.WORLD)
        yield World(0, 0, 1, CPU)
    distributed.destroy_process_group()


class MadeEngine:
    """What Checkpointer uses of DeepSpeed's engine, around two tensors that follow from the step."""

    def __init__(self, step: int = 0) -> None:
        self.checkpoint_engine: Any = None
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self.weights, self.moments = torch.zeros(40_000), torch.zeros(20_000)
        self.step(step)

    def step(self, step: int) -> None:
        self.global_steps = step
        self.optimizer.param_groups[0]["lr"] = step / 8
        self.weights.fill_(step)
        self.moments.fill_(-step)

    @property
    def values(self) -> set[float]:
        return {abs(value) for tensor in (self.weights, self.moments) for value in tensor.unique().tolist()}

    def zero_optimization(self) -> bool:
        return True

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        model = {"module": {"weights": self.weights, "tied": self.weights}, "global_steps": self.global_steps}
        self.checkpoint_engine.save(model, f"{save_dir}/{tag}/mp_rank_00_model_states.pt")
        optimizer = {"moments": self.moments, "lr": self.optimizer.param_groups[0]["lr"]}
        self.checkpoint_engine.save(optimizer, f"{save_dir}/{tag}/zero_pp_rank_0_mp_rank_00_optim_states.pt")

    def load_checkpoint(self, load_dir: str, tag: str, load_lr_scheduler_states: bool) -> tuple[str, dict[str, Any]]:
        model = self.checkpoint_engine.load(f"{load_dir}/{tag}/mp_rank_00_model_states.pt")
        optimizer = self.checkpoint_engine.load(f"{load_dir}/{tag}/zero_pp_rank_0_mp_rank_00_optim_states.pt")
        self.weights.copy_(model["module"]["weights"])
        self.moments.copy_(optimizer["moments"])
        self.global_steps = model["global_steps"]
        self.optimizer.param_groups[0]["lr"] = optimizer["lr"]
        return load_dir, {}


class Run:
    """A run of made engines in one folder. lines: what was said."""

    def __init__(self, output_dir: Path, world: World, step: int = 0, **settings: Any) -> None:
        self.made = MadeEngine(step)
        self.lines: list[str] = []
        self.engine: Any = SimpleNamespace(world=world, deepspeed=self.made, before_update=lambda: None)
        self.checkpointer = Checkpointer(
            self.engine,
            output_dir,
            CheckpointSection(**settings),
            zero_stage=2,
            precision="fp32",
            sources=Sources("", "", {}),
            say=self.lines.append,
        )

    def save(self, step: int) -> None:
        """Comes to `step`, as Engine.train_step does, and saves."""
        self.engine.before_update()
        self.made.step(step)
        self.checkpointer.save(step, 8 * step, step / 8)


def saved(output_dir: Path, world: World, *steps: int, **settings: Any) -> Path:
    run = Run(output_dir, world, **settings)
    for step in steps:
        run.save(step)
    run.checkpointer.close()
    return output_dir


def resumed(output_dir: Path, world: World) -> MadeEngine:
    """The engine of a new start in the folder."""
    found = find("auto", output_dir, world)
    assert found is not None
    run = Run(output_dir, world)
    assert run.checkpointer.load(found.folder) == found.info
    return run.made


def names(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir)]


def test_a_save_leaves_its_folder_the_pointer_and_nothing_else(world, tmp_path):
    run = saved(tmp_path / "run", world, 1, 2)
    assert names(run) == ["step-00000001", "step-00000002"]
    assert {path.name for path in run.iterdir()} == {CHECKPOINTS, checkpoint.POINTER_NAME}
    assert not list(run.rglob("*.partial*"))
    info = checkpoint.read_info(run / CHECKPOINTS / "step-00000002")
    assert (info.step, info.samples, info.learning_rate, info.world_size) == (2, 16, 0.25, 1)
    assert set(info.files) == {
        "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "generators_rank_00000.pt",
    }  # fmt: skip
    assert resumed(run, world).values == {2.0}


def operations_of_a_save(folder: Path, world: World) -> list[str]:
    with faults.Storage(folder) as storage:
        saved(folder / "run", world, 2, keep_last=1)
    return storage.operations


@pytest.fixture
def base(world, tmp_path):
    """A folder whose `run` has a checkpoint of step 1."""
    (tmp_path / "base").mkdir()
    saved(tmp_path / "base" / "run", world, 1)
    return tmp_path / "base"


def trial(folder: Path, world: World, number: int, fault: str) -> tuple[faults.Storage, Run | None]:
    """Saves step 2 in a run that has step 1 and keeps one; the run when it lives on."""
    with faults.Storage(folder, number, fault) as storage:
        try:
            run = Run(folder / "run", world, keep_last=1)
            run.save(2)
            run.checkpointer.wait()
        except faults.Killed:
            return storage, None
    return storage, run


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_every_operation_of_a_save_with_every_fault_leaves_one_whole_checkpoint(
    fault, base, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(durable, "is_running", lambda *_: False)  # who wrote in this process counts as gone
    shutil.copytree(base, tmp_path / "counted")
    operations = operations_of_a_save(tmp_path / "counted", world)
    assert {"mkdir", "open", "write", "fsync", "replace", "unlink", "rmdir"} <= set(operations)
    fired = 0
    for number, operation in enumerate(operations, 1):
        folder = tmp_path / f"{number}"
        shutil.copytree(base, folder)
        storage, run = trial(folder, world, number, fault)
        if fault in faults.WRITE_FAULTS and operation != "write":
            assert not storage.fired
            continue
        assert storage.fired, (number, operation)
        fired += 1
        if fault in faults.CUTS:
            folder = storage.left(tmp_path / f"{number}-left")
        if run is not None:
            assert run.checkpointer._last is not None
            if run.checkpointer._last.failure is not None:
                assert names(folder / "run") == ["step-00000001"], "nothing has a final name after a failed save"
                assert any("not saved" in line for line in run.lines)
            run.save(3)
            run.checkpointer.close()
            assert resumed(folder / "run", world).values == {3.0}
        else:
            assert resumed(folder / "run", world).values in ({1.0}, {2.0}), (number, operation)
            assert resumed(saved(folder / "run", world, 3), world).values == {3.0}
            assert not list(folder.rglob("*.partial*")), "a new start removes what the killed one left"
        shutil.rmtree(folder)
    assert fired == (operations.count("write") if fault in faults.WRITE_FAULTS else len(operations))


def test_without_fsync_the_same_trial_loses_the_run(base, world, tmp_path, monkeypatch):
    """The control of the one above."""
    shutil.copytree(base, tmp_path / "counted")
    operations = operations_of_a_save(tmp_path / "counted", world)
    lost = 0
    for number, _ in enumerate(operations, 1):
        folder = tmp_path / f"{number}"
        shutil.copytree(base, folder)
        with monkeypatch.context() as patch:
            patch.setattr(faults.Storage, "fsyncs", False)
            storage, _ = trial(folder, world, number, "lost data")
        assert storage.fired
        try:
            assert resumed(storage.left(tmp_path / f"{number}-left") / "run", world).values in ({1.0}, {2.0})
        except (UserError, AssertionError):
            lost += 1
    assert lost


def test_a_full_disk_is_said_and_the_next_save_tries_again_until_too_many_have_failed(world, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", world, max_failures=3)
    run.save(1)
    run.checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run.save(2)
        run.save(3)  # waits for the one before
        run.checkpointer.wait()
    run.save(4)
    run.checkpointer.wait()
    assert names(tmp_path / "run") == ["step-00000001", "step-00000004"]
    expected = "checkpoint of step {} not saved: No space left on device; training goes on"
    assert [line for line in run.lines if "not saved" in line] == [expected.format(2), expected.format(3)]
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run.save(5)
    run.save(6)
    run.save(7)
    with pytest.raises(UserError, match=r"3 checkpoints in a row could not be saved, the last at step 7: No space"):
        run.checkpointer.wait()
    assert names(tmp_path / "run") == ["step-00000001", "step-00000004"]


def test_a_last_save_that_fails_is_an_error(world, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", world)
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded")))
    run.save(1)
    with pytest.raises(UserError, match=r"the last checkpoint, of step 1, could not be saved: Disk quota exceeded"):
        run.checkpointer.close()


def test_the_last_ones_and_every_mth_are_kept(world, tmp_path):
    saved(tmp_path / "run", world, *range(1, 10), keep_last=2, keep_every=4)
    assert names(tmp_path / "run") == [f"step-0000000{step}" for step in (4, 8, 9)]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_the_state_at_the_call(background, world, tmp_path):
    run = Run(tmp_path / "run", world, background=background)
    for step in range(1, 20):
        run.save(step)
    run.checkpointer.close()
    assert len(list_checkpoints(tmp_path / "run")) == 3
    for folder in list_checkpoints(tmp_path / "run"):
        run = Run(tmp_path / "other", world)
        run.checkpointer.load(folder)
        assert run.made.values == {float(checkpoint.step_of(folder))}


def test_weights_wait_for_their_copy(world, tmp_path):
    """The control of the one above: a copy that is late holds the update up."""
    run = Run(tmp_path / "run", world)
    run.checkpointer._copies = SlowCopies(CPU)
    run.save(1)
    run.engine.before_update()
    run.made.step(2)
    run.checkpointer.close()
    assert run.checkpointer.stalls.copying > 0.1
    assert resumed(tmp_path / "run", world).values == {1.0}


class SlowCopies(HostCopies):
    def begin(self, states: Any) -> Any:
        copy, fill = super().begin(states)

        def slowly() -> None:
            time.sleep(0.2)
            fill()

        return copy, slowly


def test_host_memory_is_used_again_and_ties_stay(world):
    copies = HostCopies(CPU)
    weights = torch.rand(100_000)
    states = {"a": {"one": weights, "two": weights, "small": torch.ones(3), "list": [weights[:50_000], 7]}}
    before: set[int] = set()
    for _ in range(3):
        weights.add_(1)
        copy, fill = copies.begin(states)
        fill()
        found = copy["a"]
        assert torch.equal(found["one"], weights) and found["one"] is found["two"] is not weights
        assert torch.equal(found["list"][0], weights[:50_000]) and found["list"][1] == 7
        places = {found["one"].data_ptr(), found["list"][0].data_ptr()}
        assert not before or places == before
        before = places


def test_a_run_that_ends_otherwise_lets_its_save_end(world, tmp_path):
    run = Run(tmp_path / "run", world)
    run.checkpointer._copies = SlowCopies(CPU)
    run.save(1)
    assert not run.checkpointer.is_idle
    run.checkpointer.settle()
    assert run.checkpointer.is_idle and names(tmp_path / "run") == ["step-00000001"]


def test_a_second_save_of_a_step_is_none(world, tmp_path):
    run = Run(tmp_path / "run", world)
    run.save(1)
    run.save(1)
    run.checkpointer.close()
    assert len(run.lines) == 1 and names(tmp_path / "run") == ["step-00000001"]


def test_a_name_is_never_used_twice(world, tmp_path):
    saved(tmp_path / "run", world, 1)
    run = Run(tmp_path / "run", world, step=5)  # a run that never loaded what is there
    run.checkpointer.save(1, 8, 0.625)
    with pytest.raises(UserError, match="File exists"):
        run.checkpointer.close()
    assert resumed(tmp_path / "run", world).values == {1.0}


def test_going_back_sets_the_newer_ones_aside(world, tmp_path):
    run = Run(tmp_path / "run", world)
    for step in (1, 2, 3):
        run.save(step)
    run.checkpointer.load(tmp_path / "run" / CHECKPOINTS / "step-00000002", goes_on=False)
    assert names(tmp_path / "run") == ["step-00000001", "step-00000002", "step-00000003"]
    run.checkpointer.load(tmp_path / "run" / CHECKPOINTS / "step-00000001")
    assert run.made.values == {1.0}
    assert names(tmp_path / "run") == ["step-00000001"]
    assert len(list((tmp_path / "run" / CHECKPOINTS).glob("abandoned-*"))) == 2
    run.save(2)
    run.checkpointer.close()
    assert names(tmp_path / "run") == ["step-00000001", "step-00000002"]


def flip(generator: random.Random, path: Path, other: Path) -> str:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return "flipped"


def truncate(generator: random.Random, path: Path, other: Path) -> str:
    os.truncate(path, generator.randrange(path.stat().st_size))
    return "truncated"


def delete(generator: random.Random, path: Path, other: Path) -> str:
    path.unlink()
    return "deleted"


def swap(generator: random.Random, path: Path, other: Path) -> str:
    """By the file of the same name of another step's checkpoint."""
    path.write_bytes(other.read_bytes())
    return "swapped"


def test_2000_damages_are_found_and_named_and_200_clean_checkpoints_pass(world, tmp_path):
    run = Run(tmp_path / "run", world)
    run.made.weights, run.made.moments = torch.zeros(300), torch.zeros(200)
    for step in (1, 2):
        run.save(step)
    run.checkpointer.close()
    one, two = list_checkpoints(tmp_path / "run")
    generator = random.Random(20261125)
    paths = sorted(two.iterdir())
    assert {path.name for path in paths} == {*checkpoint.read_info(two).files, MANIFEST_NAME}
    whole = {path: path.read_bytes() for path in paths}
    if whole[two / "generators_rank_00000.pt"] == (one / "generators_rank_00000.pt").read_bytes():
        paths_to_swap = [path for path in paths if not path.name.startswith("generators")]
    else:
        paths_to_swap = paths
    found: dict[str, int] = {}
    for _ in range(2000):
        damage = generator.choice([flip, truncate, delete, swap])
        path = generator.choice(paths_to_swap if damage is swap else paths)
        kind = damage(generator, path, one / path.name)
        with pytest.raises(UserError) as error:
            checkpoint.verify_together(two, world)
        assert str(path) in str(error.value), (kind, path)
        with pytest.raises(UserError) as error:
            checkpoint.verify(two, checkpoint.read_info(two))
        assert str(path) in str(error.value)
        found[kind] = found.get(kind, 0) + 1
        path.write_bytes(whole[path])
    assert sum(found.values()) == 2000 and min(found.values()) > 400, found
    for _ in range(200):
        assert checkpoint.verify_together(two, world).step == 2


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def test_nothing_of_a_changed_file_is_unpickled(world, tmp_path):
    run = saved(tmp_path / "run", world, 1, 2)
    path = run / CHECKPOINTS / "step-00000002" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    write_state(path, {**state, "extra": Bomb(str(tmp_path / "boom"))})
    assert resumed(run, world).values == {1.0}
    (aside,) = (run / CHECKPOINTS).glob("abandoned-step-00000002-*")
    aside.rename(path.parent)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt is damaged"):
        Run(run, world).checkpointer.load(path.parent)
    assert not (tmp_path / "boom").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "boom").exists(), "the control: whoever unpickles it, runs it"


def damage(folder: Path) -> None:
    with open(folder / "mp_rank_00_model_states.pt", "r+b") as file:
        file.write(b"?")


def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(world, tmp_path):
    run = saved(tmp_path / "run", world, 1, 2, 3)
    *_, two, three = list_checkpoints(run)
    damage(three)
    (two / MANIFEST_NAME).unlink()
    found = find("auto", run, world)
    assert found is not None and found.folder.name == "step-00000001"
    assert found.skipped == (
        f"{three}/mp_rank_00_model_states.pt is damaged (its sha256 is not checkpoint.json's)",
        f"{two}/checkpoint.json cannot be read (No such file or directory): {two} is no checkpoint",
    )


def test_checkpoints_of_which_none_is_whole_are_an_error_and_no_new_start(world, tmp_path):
    run = saved(tmp_path / "run", world, 1, 2)
    for folder in list_checkpoints(run):
        damage(folder)
    with pytest.raises(UserError, match=r"no whole checkpoint is left in .*step-00000002/mp.*step-00000001/mp"):
        find("auto", run, world)
    shutil.rmtree(run / CHECKPOINTS)
    with pytest.raises(UserError, match=r"no whole .*step-00000002, the last that was saved, is gone"):
        find("auto", run, world)
    (run / checkpoint.POINTER_NAME).write_bytes(b"{")
    with pytest.raises(UserError, match=r"last_checkpoint.json is damaged"):
        find("auto", run, world)
    assert find("auto", tmp_path / "new", world) is None


def test_a_named_checkpoint_has_to_be_whole_and_not_to_mix_two_runs(world, tmp_path):
    run, other = saved(tmp_path / "run", world, 1, 2), saved(tmp_path / "other", world, 1)
    one, two = list_checkpoints(run)
    assert find(str(one), run, world) == find(str(one), tmp_path / "new", world)
    with pytest.raises(UserError, match=r"holds step-00000001; give another --output_dir, or --resume auto"):
        find(str(one), other, world)
    with pytest.raises(UserError, match=r"expected auto, none or a folder such as"):
        find(str(run), run, world)
    with pytest.raises(UserError, match=r"--resume none, but .*run holds step-00000002"):
        find("none", run, world)
    damage(two)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt is damaged"):
        find(str(two), run, world)
    (one / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"mp_rank_01_model_states.pt is not of this checkpoint"):
        find(str(one), run, world)


def test_states_that_are_not_the_manifests_after_loading_are_refused(world, tmp_path, monkeypatch):
    """As DeepSpeed 8499 would: it loads, and what it has loaded are other weights."""
    saved(tmp_path / "run", world, 1)
    run = Run(tmp_path / "run", world)

    def loads(step: int, weight: float) -> None:
        def load_checkpoint(*_: Any, **__: Any) -> tuple[str, None]:
            run.made.step(step)
            run.made.weights[7] = weight
            return "", None

        monkeypatch.setattr(run.made, "load_checkpoint", load_checkpoint)

    loads(2, 2.0)
    with pytest.raises(UserError, match=r"rank 0 has step 2 instead of 1; learning rate 0.25 instead of"):
        run.checkpointer.load(tmp_path / "run" / CHECKPOINTS / "step-00000001")
    loads(1, 1.5)
    with pytest.raises(UserError, match=r"rank 0 has weights and optimizer states '"):
        run.checkpointer.load(tmp_path / "run" / CHECKPOINTS / "step-00000001")


def test_the_position_of_a_checkpoint_is_that_of_the_recipe():
    info = checkpoint.CheckpointInfo(3, 24, 0.1, 1, 2, "fp32", Sources("a", "", {}), (), {})
    checkpoint.check_position(info, 24, 0.1, Sources("a", "", {}))
    checkpoint.check_position(info, 24, 0.2, Sources("another", "", {}))
    with pytest.raises(UserError, match=r"of step 3 has 24 samples, the recipe 32"):
        checkpoint.check_position(info, 32, 0.1, Sources("a", "", {}))
    with pytest.raises(UserError, match=r"step 3 had the learning rate 0.1, the recipe gives 0.2 now"):
        checkpoint.check_position(info, 24, 0.2, Sources("a", "", {}))


def test_generators_go_on_where_they_were(world, tmp_path):
    run = Run(tmp_path / "run", world)
    run.save(1)

    def drawn() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()]

    expected = drawn()
    drawn()
    run.checkpointer.load(tmp_path / "run" / CHECKPOINTS / "step-00000001")
    assert drawn() == expected


def test_saves_are_due_by_steps_by_minutes_and_at_the_end(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    due = Due(CheckpointSection(every_steps=4, every_minutes=1.0), max_steps=11)
    found = []
    for step in range(1, 12):
        now += 35.0
        if due.at(step, due.asks()):
            found.append(step)
    assert found == [2, 4, 6, 8, 10, 11]
    assert not Due(CheckpointSection(every_steps=0), 11).at(10, False)
    assert Due(CheckpointSection(every_steps=0), 11).at(10, True), "another rank's clock"


def test_a_file_that_another_rank_wrote_elsewhere_is_noticed(world, tmp_path, monkeypatch):
    """Storage that is not shared: rank 0 does not find what was written."""
    run = Run(tmp_path / "run", world)
    written = Checkpointer._files_written

    def elsewhere(self: Checkpointer, states: Any, temporary: Path) -> Any:
        found = written(self, states, temporary)
        (temporary / "mp_rank_00_model_states.pt").unlink()
        return found

    monkeypatch.setattr(Checkpointer, "_files_written", elsewhere)
    run.save(1)
    with pytest.raises(UserError, match=r"No such file or directory.*on storage that all ranks share"):
        run.checkpointer.close()
    assert list_checkpoints(tmp_path / "run") == []


def test_the_manifest_is_read_as_it_was_written(world, tmp_path):
    folder = list_checkpoints(saved(tmp_path / "run", world, 1))[0]
    info = checkpoint.read_info(folder)
    assert checkpoint.manifest_bytes(info) == (folder / MANIFEST_NAME).read_bytes()
    raw = json.loads((folder / MANIFEST_NAME).read_bytes())
    raw["samples"] += 1
    (folder / MANIFEST_NAME).write_bytes(durable.json_bytes(raw))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read_info(folder)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_info(tmp_path)
