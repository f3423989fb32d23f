"""Work that is repeated: equal where nothing is wrong, and every flipped bit of a gradient is seen."""

import random

import pytest
import torch

from data_prep.errors import UserError
from pipeline.digests import digest
from pipeline.replay import check_possible, is_repeatable, outliers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(97, 32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 97)
    )


def gradients(model, damage=lambda gradients: None):
    ids = torch.arange(64).view(2, 32)
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    found = list(torch.autograd.grad(loss, list(model.parameters())))
    damage(found)
    return found


def test_fifty_of_fifty_flipped_bits_are_found_and_nothing_where_none_is(model):
    generator = random.Random(20261125)
    for _ in range(50):
        assert is_repeatable(lambda: gradients(model))
        passes = 0

        def flip(found):
            nonlocal passes
            passes += 1
            if passes == 2:  # a fault that comes and goes
                bits = generator.choice(found).view(torch.int32).view(-1)
                bits[generator.randrange(len(bits))] ^= 1 << generator.randrange(31)

        assert not is_repeatable(lambda flip=flip: gradients(model, flip))
        assert passes == 2


def test_a_digest_is_of_bytes_not_of_values():
    zeros = torch.zeros(3)
    assert digest([zeros]) != digest([-zeros]) and digest([zeros]) == digest([torch.zeros(3)])
    assert digest([torch.tensor([torch.nan])]) == digest([torch.tensor([torch.nan])])


def test_the_rank_that_differs_from_most_is_named_and_all_where_there_is_no_majority():
    assert outliers(["a", "a", "a"]) == []
    assert outliers(["a", "b", "a"]) == [1]
    assert outliers(["a", "b"]) == [0, 1]
    assert outliers(["a", "a", "b", "b"]) == [0, 1, 2, 3]


def test_where_steps_cannot_be_verified_the_start_says_so():
    check_possible(2, "cpu", deterministic=False)
    with pytest.raises(UserError, match="stage 3"):
        check_possible(3, "cpu", deterministic=False)
    with pytest.raises(UserError, match="--deterministic"):
        check_possible(2, "cuda", deterministic=False)
