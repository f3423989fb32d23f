"""Who is behind, and who is slow."""

import sys

from pipeline.watchdog import Place, Stragglers, behind, place_of


def place(step=5, *, waits=True, phase="step", where="all_reduce"):
    return Place(phase, step, where, waits)


def test_a_rank_that_does_not_answer_is_behind():
    ranks, why = behind({0: place(), 2: place(waits=False)}, 3)
    assert ranks == [1] and "rank 1 did not answer" in why


def test_a_rank_at_an_earlier_step_is_behind():
    ranks, why = behind({0: place(6), 1: place(5), 2: place(6)}, 3)
    assert ranks == [1] and "rank 1 is at step 5" in why


def test_a_rank_that_waits_for_nobody_is_behind_those_that_do():
    ranks, why = behind({0: place(), 1: place(waits=False, where="sleep (a.py:1)"), 2: place()}, 3)
    assert ranks == [1] and "wait for rank 1 at step 5" in why and "sleep (a.py:1)" in why


def test_nobody_is_named_where_all_wait_or_none_does():
    assert behind({0: place(), 1: place()}, 2)[0] == []
    assert behind({0: place(waits=False), 1: place(waits=False)}, 2)[0] == []


def test_a_stack_with_torchs_collectives_is_one_that_waits():
    def innermost():
        return place_of(sys._getframe(), "step", 1)

    assert not innermost().waits
    for name, waits in (("torch/distributed/distributed_c10d.py", True), ("torch/optim/adamw.py", False)):
        scope: dict = {}
        exec(compile("def called(function):\n    return function()", f"/site-packages/{name}", "exec"), scope)
        found = scope["called"](innermost)
        assert found.waits == waits and found.where.startswith("innermost (pipeline/test_watchdog.py:")


def test_a_rank_slow_three_times_in_a_row_is_named_and_then_ever_less_often():
    looks = Stragglers()
    named = [bool(looks.look({0: 1.0, 1: 1.1, 2: 2.0})) for _ in range(12)]
    assert [number for number, found in enumerate(named, start=1) if found] == [3, 6, 12]
    assert looks.look({0: 1.0, 1: 1.1, 2: 1.2}) == []
    assert not any(looks.look({0: 1.0, 1: 1.1, 2: 2.0}) for _ in range(2))
    assert looks.look({0: 1.0, 1: 1.1, 2: 2.0}) == [2]


def test_short_work_is_never_called_slow():
    looks = Stragglers()
    assert not any(looks.look({0: 0.001, 1: 0.009}) for _ in range(20))
