"""Steps that go wrong: what is decided, what is written down, and that a run which reads it decides the same."""

import json
import math

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.batch import BatchPlan
from pipeline.engine import Losses, Site, StepResult, sites_of
from pipeline.incidents import INCIDENTS_NAME, Judge, Spikes, passed_over, read_history, samples_of
from pipeline.recipe import DEFAULT_RECIPE, FaultsSection, check_recipe, read_recipe_file
from pipeline.stages import BatchSizes


def result(loss=2.0, *, applied=True, sites=(), scaling=False):
    return StepResult(Losses(100, loss, (loss,), None), 1.0 if applied else None, applied, sites, scaling)


BAD = result(math.nan, applied=False, sites=(Site(1, 0),))


@pytest.fixture
def judge(tmp_path):
    """judge(losses=..., saved=..., **faults) -> a judge of the run in tmp_path, as a start of it makes one."""

    def make(*, losses=(), first_step=0, saved=None, sizes=None, **faults):
        return Judge(
            tmp_path,
            FaultsSection(**faults),
            read_history(tmp_path),
            losses=losses,
            first_step=first_step,
            last_saved=lambda: first_step if saved is None else saved,
            sizes=sizes or BatchSizes({0: 8}),
            batches=BatchPlan(8, 2, 2, 2),
            is_first=True,
            say=lambda line: None,
        )

    return make


def written(folder):
    path = folder / INCIDENTS_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_bits_of_a_sum_of_flags_name_rank_and_micro_batch():
    assert sites_of([0.0, 2.0**0 + 2.0**3, 2.0**52]) == (Site(1, 0), Site(1, 3), Site(2, 52))


def test_samples_of_a_site_are_those_that_the_loader_deals_to_it():
    batches, sizes = BatchPlan(24, 2, 4, 3), BatchSizes({0: 24})
    runs = np.arange(24).reshape(-1, 3, 2)  # pipeline.loader.step_batches
    for rank in range(3):
        for micro_batch in range(4):
            assert samples_of(0, [Site(rank, micro_batch)], sizes, batches) == runs[micro_batch, rank].tolist()
    assert samples_of(0, [], sizes, batches) == list(range(24))


def test_skips_are_written_and_good_steps_between_them_start_the_count_anew(judge, tmp_path):
    one = judge(max_skips=3)
    for step, found in enumerate([BAD, BAD, result(), BAD, BAD], start=1):
        assert one.look(step, found) == "go_on"
    assert [(record["step"], record["kind"]) for record in written(tmp_path)] == [
        (step, "non_finite_loss") for step in (1, 2, 4, 5)
    ]
    with pytest.raises(UserError, match=r"3 steps in a row, up to 6.*pipeline.trace .*--step 6.*on_skips rollback"):
        one.look(6, BAD)


def test_what_fp16_leaves_out_for_its_loss_scale_is_no_incident(judge, tmp_path):
    one = judge(max_skips=1)
    assert one.look(1, result(applied=False, scaling=True)) == "go_on" and written(tmp_path) == []


def test_a_loss_that_is_not_finite_and_was_applied_ends_the_run(judge):
    with pytest.raises(UserError, match="the weights were changed"):
        judge().look(1, result(math.nan, sites=(Site(0, 0),)))


def test_a_resumed_run_leaves_the_same_steps_out_and_counts_on(judge, tmp_path):
    one = judge(max_skips=3)
    one.look(1, result())
    one.look(2, BAD)
    one.look(3, BAD)
    again = judge(max_skips=3, first_step=2)
    assert [again.left_out(step) for step in (1, 2, 3, 4)] == [False, True, True, False]
    again.look(3, BAD)
    assert len(written(tmp_path)) == 2, "the same incident is not written twice"
    with pytest.raises(UserError, match="3 steps in a row"):
        again.look(4, BAD)


def test_after_a_stop_the_steps_since_the_checkpoint_are_decided_anew(judge, tmp_path):
    one = judge(max_skips=2, saved=2)
    one.look(1, BAD)
    one.look(2, result())
    one.look(3, BAD)
    with pytest.raises(UserError):
        one.look(4, BAD)
    assert read_history(tmp_path).skipped == {1}


def test_a_rollback_passes_over_the_samples_since_the_checkpoint_each_time_more(judge, tmp_path):
    one = judge(max_skips=2, on_skips="rollback", saved=10)
    assert one.look(11, BAD) == "go_on" and one.look(12, BAD) == "rollback"
    history = read_history(tmp_path)
    assert history.skip_samples == {10: 16} and history.skipped == set() and history.skips_before(10) == 0
    again = judge(max_skips=2, on_skips="rollback", first_step=10, sizes=BatchSizes({0: 8}, history.skip_samples))
    again.look(11, result())
    again.look(12, BAD)
    assert again.look(13, BAD) == "rollback"
    assert read_history(tmp_path).skip_samples == {10: 16 + 24}


def test_a_run_does_not_go_back_to_one_step_for_ever(judge):
    for _ in range(3):
        assert judge(max_skips=1, on_skips="rollback", first_step=10).look(11, BAD) == "rollback"
    with pytest.raises(UserError, match="went back to step 10 3 times already"):
        judge(max_skips=1, on_skips="rollback", first_step=10).look(11, BAD)


def test_the_recipe_of_the_next_start_has_what_was_skipped(judge, tmp_path):
    recipe = check_recipe(read_recipe_file(DEFAULT_RECIPE), "demo")
    judge(max_skips=1, on_skips="rollback", first_step=4).look(5, BAD)
    sizes = passed_over(recipe, read_history(tmp_path)).training.batch_sizes
    before = recipe.training.batch_sizes
    assert sizes.first_sample(3) == before.first_sample(3) and sizes.consumed(4) == before.consumed(4)
    assert sizes.first_sample(4) == before.first_sample(4) + 8
    assert sizes.trained(9) == before.trained(9), "the learning rate does not see it"


def test_a_torn_last_line_is_dropped_and_a_damaged_one_refused(judge, tmp_path):
    judge().look(1, BAD)
    path = tmp_path / INCIDENTS_NAME
    path.write_bytes(path.read_bytes() + b'{"step": 2, "kin')
    judge().look(2, BAD)
    assert [record["step"] for record in written(tmp_path)] == [1, 2]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        judge()


class TestSpikes:
    losses = 3 + 0.1 * np.random.default_rng(0).standard_normal(2000)

    def test_noise_is_none_and_a_jump_is_one_at_its_first_step(self):
        spikes = Spikes(10.0, [])
        assert all(spikes.look(loss) is None for loss in self.losses)
        assert spikes.look(6.0) > 10
        assert spikes.look(6.0) is None and spikes.look(3.0) is None and spikes.look(6.0) is not None

    def test_losses_that_fall_and_losses_that_hardly_vary_are_none(self):
        spikes = Spikes(10.0, [])
        assert all(spikes.look(7 * 0.99**step) is None for step in range(500))
        assert spikes.look(spikes._window[-1] * 1.005) is None

    def test_a_resumed_run_judges_as_the_one_that_was_not_stopped(self):
        losses = self.losses.copy()
        losses[[700, 701, 1000]] = 9.0
        whole = Spikes(10.0, [])
        found = [whole.look(loss) for loss in losses]
        assert [step for step, score in enumerate(found) if score is not None] == [700, 1000]
        for start in (699, 701, 702, 1001):
            resumed = Spikes(10.0, losses[max(0, start - 128) : start])
            assert [resumed.look(loss) for loss in losses[start:]] == found[start:]

    def test_a_spike_is_reported_or_taken_back(self, judge, tmp_path):
        one = judge(losses=self.losses[:64], first_step=64)
        assert one.look(65, result(8.0)) == "go_on"
        assert [record["kind"] for record in written(tmp_path)] == ["spike"]
        other = judge(losses=self.losses[:64], first_step=64, on_spike="rollback")
        assert other.look(65, result(8.0)) == "rollback"
        assert [record["kind"] for record in written(tmp_path)] == ["spike", "rollback"]
