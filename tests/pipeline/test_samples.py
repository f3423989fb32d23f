"""What the model sees at sample number n: every token once an epoch, masks by the book, nothing from the world size."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encoding import load_tokenizer_info
from data_prep.errors import UserError
from data_prep.pack import make_plan
from data_prep.shards import ShardSet
from pipeline.batch import BatchPlan
from pipeline.data import Ahead, step_batches, validation_batches
from pipeline.recipe import MaskingSection
from pipeline.samples import IGNORED, Samples

LENGTH = 32


@pytest.fixture(scope="module")
def make_samples(tiny_shards, tiny_tokenizer):
    shards = ShardSet.open(tiny_shards)
    special = load_tokenizer_info(tiny_tokenizer).special

    def make(objective, split="train", seed=1234, **masking):
        plan = make_plan(shards, objective, LENGTH, 0.1)
        return Samples(shards, plan, split, seed=seed, special=special, masking=MaskingSection(**masking))

    return make


@pytest.fixture(scope="module")
def train_documents(tiny_shards):
    """The training documents, read one by one, in order."""
    shards = ShardSet.open(tiny_shards)
    plan = make_plan(shards, "causal", LENGTH, 0.1)
    return [
        shards.shard(index).document(document)
        for index in range(len(shards.names))
        for document in range(plan.train.end_document[index])
    ]


def test_an_epoch_of_causal_samples_is_the_corpus_cut_in_equal_stretches(make_samples, train_documents):
    samples = make_samples("causal")
    stream = np.concatenate(train_documents).astype(np.int64)
    assert samples.size == (len(stream) - 1) // LENGTH
    batch = samples.batch(np.arange(samples.size))
    starts = {stream[i * LENGTH : (i + 1) * LENGTH].tobytes(): i for i in range(samples.size)}
    for inputs, labels in zip(batch.input_ids, batch.labels, strict=True):
        i = starts.pop(inputs.tobytes())
        assert np.array_equal(labels, stream[i * LENGTH + 1 : (i + 1) * LENGTH + 1])
    assert not starts


def test_validation_samples_hold_no_training_document(make_samples, tiny_shards):
    shards = ShardSet.open(tiny_shards)
    plan = make_plan(shards, "causal", LENGTH, 0.1)
    held_out = np.concatenate(
        [
            shards.shard(index).document(document)
            for index in range(len(shards.names))
            for document in range(plan.validation.first_document[index], plan.validation.end_document[index])
        ]
    ).astype(np.int64)
    samples = make_samples("causal", "validation")
    assert samples.size == (len(held_out) - 1) // LENGTH > 0
    rows = {row.tobytes() for row in samples.batch(np.arange(samples.size)).input_ids}
    assert rows == {held_out[i * LENGTH : (i + 1) * LENGTH].tobytes() for i in range(samples.size)}


@pytest.mark.parametrize("objective", ["causal", "mlm"])
@given(world=st.sampled_from([1, 2, 4, 8, 16]), micro=st.sampled_from([1, 2]), step=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_a_step_is_the_same_samples_on_any_number_of_ranks(make_samples, objective, world, micro, step):
    samples = make_samples(objective)
    whole = samples.batch(np.arange(step * 32, step * 32 + 32))
    plan = BatchPlan(32, micro, 32 // micro // world, world)
    rows = [
        (inputs.tobytes(), labels.tobytes())
        for rank in range(world)
        for batch in step_batches(samples, step, plan, rank)
        for inputs, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]
    expected = [(i.tobytes(), la.tobytes()) for i, la in zip(whole.input_ids, whole.labels, strict=True)]
    assert sorted(rows) == sorted(expected)


def test_every_epoch_is_another_order_of_the_same_samples(make_samples):
    samples = make_samples("causal")
    numbers = np.arange(3 * samples.size)
    epochs, places = samples.place(numbers)
    assert np.array_equal(epochs, numbers // samples.size)
    orders = places.reshape(3, -1)
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(samples.size))
    assert np.count_nonzero(orders[0] == orders[1]) < samples.size / 10


def test_masked_samples_are_framed_and_masks_never_touch_special_tokens(make_samples, tiny_tokenizer):
    special = load_tokenizer_info(tiny_tokenizer).special
    samples = make_samples("mlm", probability=1.0, mask=1.0, random=0.0)
    batch = samples.batch(np.arange(samples.size))
    assert (batch.input_ids[:, 0] == special.classification).all()
    assert (batch.input_ids[:, -1] == special.separator).all()
    everywhere = np.isin(batch.input_ids, [special.classification, special.separator, special.mask])
    assert everywhere.all(), "with probability 1 every ordinary token is masked, every special one is left"
    assert (batch.labels[batch.input_ids != special.mask] == IGNORED).all()
    ids = [token for token in dataclasses.asdict(special).values() if token is not None]
    assert not np.isin(batch.labels, ids).any()
    assert special.end_of_document not in batch.input_ids


def test_masks_have_the_rates_of_the_paper(make_samples, tiny_tokenizer):
    special = load_tokenizer_info(tiny_tokenizer).special
    samples = make_samples("mlm")
    plain = make_samples("mlm", probability=0.0)
    numbers = np.arange(20 * samples.size)
    batch, original = samples.batch(numbers), plain.batch(numbers)
    ordinary = ~np.isin(original.input_ids, [special.classification, special.separator])
    targets = batch.labels != IGNORED
    assert np.array_equal(batch.labels[targets], original.input_ids[targets])
    assert np.array_equal(batch.input_ids[~targets], original.input_ids[~targets])
    count = targets.sum()
    # Three standard deviations of a binomial around each rate.
    assert abs(count / ordinary.sum() - 0.15) < 3 * np.sqrt(0.15 * 0.85 / ordinary.sum())
    masked = (batch.input_ids[targets] == special.mask).sum()
    kept = (batch.input_ids[targets] == batch.labels[targets]).sum()
    assert abs(masked / count - 0.8) < 3 * np.sqrt(0.8 * 0.2 / count)
    # A random token is the old one once in a vocabulary.
    assert abs(kept / count - (0.1 + 0.1 / 762)) < 3 * np.sqrt(0.1 * 0.9 / count)


def test_masks_are_drawn_anew_each_epoch_and_are_a_function_of_seed_and_sample(make_samples):
    samples, again, other = make_samples("mlm"), make_samples("mlm"), make_samples("mlm", seed=4321)
    numbers = np.arange(8)
    first = samples.batch(numbers)
    assert np.array_equal(first.labels, again.batch(numbers[::-1]).labels[::-1])
    _, places = samples.place(np.arange(2 * samples.size))
    sample = places[0]
    second_time = samples.size + int(np.flatnonzero(places[samples.size :] == sample)[0])
    assert not np.array_equal(first.labels[0], samples.batch(np.array([second_time])).labels[0])
    assert not np.array_equal(first.labels, other.batch(numbers).labels)


def test_negative_numbers_are_rows_without_targets(make_samples):
    batch = make_samples("causal").batch(np.array([3, -1]))
    assert len(batch.targets) == LENGTH
    assert (batch.labels[1] == IGNORED).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_takes_each_held_out_sample_once_and_ranks_stay_in_step(make_samples, world):
    samples = make_samples("causal", "validation")
    count = samples.size - 1
    plan = BatchPlan(4 * world, 4, 1, world)
    shares = [list(validation_batches(samples, count, plan, rank)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    targets = sum(len(batch.targets) for share in shares for batch in share)
    assert targets == count * LENGTH


def test_mlm_without_a_mask_token_is_refused(tiny_shards, tiny_tokenizer):
    shards = ShardSet.open(tiny_shards)
    special = dataclasses.replace(load_tokenizer_info(tiny_tokenizer).special, mask=None)
    with pytest.raises(UserError, match="no mask"):
        Samples(
            shards, make_plan(shards, "mlm", LENGTH, 0.1), "train", seed=1, special=special, masking=MaskingSection()
        )


def test_batches_made_ahead_come_in_order_and_an_error_reaches_the_loop():
    def make(step):
        if step == 3:
            raise UserError("shard 7 is gone")
        return [step]

    ahead = Ahead(make, 0, 10)  # type: ignore[arg-type]
    assert [ahead.next()[0] for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="shard 7"):
        ahead.next()
    ahead.close()
