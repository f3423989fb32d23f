"""The steps of fine-tuning: their samples, their learning rates, and what follows them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from pipeline.tuning import Steps


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_every_sample_comes_once_an_epoch(samples, batch_size, epochs, seed):
    steps = Steps(samples, batch_size, epochs, 0.1)
    seen = [steps.numbers(step, seed) for step in range(steps.total)]
    for epoch in range(epochs):
        of_epoch = seen[epoch * steps.of_epoch : (epoch + 1) * steps.of_epoch]
        assert sorted(np.concatenate(of_epoch).tolist()) == list(range(samples))
        assert {len(numbers) for numbers in of_epoch[:-1]} <= {batch_size}


def test_the_order_follows_from_seed_and_epoch():
    steps = Steps(50, 50, 2, 0.1)
    orders = [tuple(steps.numbers(epoch, seed)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(Steps(50, 50, 9, 0.5).numbers(1, 2)) == orders[3], "nothing else enters"


def test_learning_rates_are_those_of_transformers_linear_schedule():
    steps = Steps(100, 10, 4, 0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 4, 40)
    theirs = []
    for _ in range(40):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [steps.learning_rate(step, 2e-5) for step in range(40)]
    assert ours[4:] == pytest.approx(theirs[4:])
    # Theirs spends the first update of the warm-up at 0.
    assert ours[:4] == pytest.approx([5e-6, 1e-5, 1.5e-5, 2e-5]) and theirs[:4] == pytest.approx([0.0, *ours[:3]])
    assert ours[-1] == pytest.approx(2e-5 / 36) and max(ours) == 2e-5


@pytest.mark.parametrize(
    ("of_epoch", "evaluations", "expected"),
    [(15, 1, [15, 30]), (15, 2, [8, 15, 23, 30]), (4, 4, [1, 2, 3, 4, 5, 6, 7, 8]), (2, 5, [1, 2, 3, 4])],
)
def test_evaluations_divide_an_epoch(of_epoch, evaluations, expected):
    steps = Steps(of_epoch * 8, 8, 2, 0.1)
    assert [done for done in range(1, steps.total + 1) if steps.end_part(done, evaluations)] == expected
