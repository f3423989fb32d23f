"""What the model sees at sample number n: every token once an epoch, masks by the book, documents kept apart."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest

from data_prep.encoding import load_tokenizer_info
from data_prep.errors import UserError
from data_prep.plan import PackSettings
from data_prep.shards import ShardSet
from pipeline.batch import BatchPlan
from pipeline.causal import Sentinels
from pipeline.loader import Ahead, step_batches, validation_batches
from pipeline.order import Places
from pipeline.recipe import CausalSection, CurriculumSection, MaskingSection
from pipeline.samples import IGNORED, stretch_length
from pipeline.stages import BatchSizes
from pipeline.startup import RankError
from tests.made_samples import made_samples

LENGTH = 32
MLM_PACKINGS = ("concatenate", "best_fit", "document", "full_sentences", "nsp", "sop")
CAUSAL_PACKINGS = ("concatenate", "best_fit", "document")
ALL = [*(("causal", name) for name in CAUSAL_PACKINGS), *(("mlm", name) for name in MLM_PACKINGS)]


@pytest.fixture(scope="module")
def special(tiny_tokenizer):
    return load_tokenizer_info(tiny_tokenizer).special


@pytest.fixture(scope="module")
def make_samples(tiny_shards, tiny_tokenizer):
    shards = ShardSet.open(tiny_shards)

    def make(objective, packing="concatenate", split="train", seed=1234, length=LENGTH, **style):
        settings = PackSettings(objective, length, packing, 0.1)
        return made_samples({"tiny": shards}, tiny_tokenizer, settings, split, seed=seed, **style)

    return make


@pytest.fixture(scope="module")
def train_documents(make_samples, tiny_shards):
    """The training documents, read one by one, in order."""
    shards = ShardSet.open(tiny_shards)
    plan = make_samples("causal").corpora[0].plan
    return [
        shards.shard(index).document(document)
        for index in range(len(shards.names))
        for document in range(plan.train.end_document[index])
    ]


def whole_epoch(samples):
    """The batch of an epoch in the order of the corpus."""
    count = samples.size
    return samples.batch_at(Places(np.zeros(count, np.int64), np.zeros(count, np.int64), np.arange(count)))


def documents_of(batch):
    """(row, begin, end) of the documents that a batch's attention keeps apart."""
    length = batch.input_ids.shape[1]
    bounds = batch.boundaries.tolist()
    return [(b // length, b % length, (e - 1) % length + 1) for b, e in itertools.pairwise(bounds)]


def test_an_epoch_of_causal_samples_is_the_corpus_cut_in_equal_stretches(make_samples, train_documents):
    samples = make_samples("causal")
    stream = np.concatenate(train_documents).astype(np.int64)
    assert samples.size == (len(stream) - 1) // LENGTH
    batch = samples.batch(np.arange(samples.size))
    starts = {stream[i * LENGTH : (i + 1) * LENGTH].tobytes(): i for i in range(samples.size)}
    for inputs, labels in zip(batch.input_ids.astype(np.int64), batch.labels, strict=True):
        i = starts.pop(inputs.tobytes())
        assert np.array_equal(labels, stream[i * LENGTH + 1 : (i + 1) * LENGTH + 1])
    assert not starts


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_every_token_of_a_causal_epoch_is_predicted_once_from_what_stands_before_it(
    make_samples, train_documents, special, packing
):
    batch = whole_epoch(make_samples("causal", packing))
    found = []
    for row, begin, end in documents_of(batch):
        inputs, labels = batch.input_ids[row, begin:end], batch.labels[row, begin:end]
        if (labels == IGNORED).all():
            assert (inputs[1:] == special.padding).all()
            continue
        assert np.array_equal(inputs[1:], labels[:-1])
        found.append((int(inputs[0]), labels.tolist()))
    pieces = []
    for document in train_documents:
        for start in range(0, len(document), LENGTH):
            before = special.end_of_document if start == 0 else int(document[start - 1])
            pieces.append((before, document[start : start + LENGTH].tolist()))
    assert sorted(found) == sorted(pieces)


@pytest.mark.parametrize("packing", ["best_fit", "document", "full_sentences"])
def test_every_token_of_a_masked_epoch_stands_once_between_cls_and_sep(make_samples, train_documents, special, packing):
    batch = whole_epoch(make_samples("mlm", packing, masking=MaskingSection(probability=0.0)))
    assert batch.target_count == 0
    parts = []
    for row, begin, end in documents_of(batch):
        ids = batch.input_ids[row, begin:end]
        if ids[0] == special.padding:
            assert (ids == special.padding).all()
            continue
        assert ids[0] == special.classification and ids[-1] == special.separator
        parts.append(ids[1:-1].tolist())
        assert not np.isin(parts[-1], [special.classification, special.separator, special.end_of_document]).any()
    assert sorted(t for part in parts for t in part) == sorted(t for doc in train_documents for t in doc[:-1].tolist())
    if packing == "full_sentences":  # in the order of the corpus
        assert [t for part in parts for t in part] == [t for doc in train_documents for t in doc[:-1].tolist()]


@pytest.mark.parametrize("packing", ["nsp", "sop"])
def test_pairs_are_framed_and_typed(make_samples, special, packing):
    samples = make_samples("mlm", packing, masking=MaskingSection(probability=0.0))
    batch = samples.batch(np.arange(4 * samples.size))
    for ids, types, label in zip(batch.input_ids, batch.token_types, batch.pair_labels, strict=True):
        first, second = np.flatnonzero(ids == special.separator)
        assert ids[0] == special.classification and label in (0, 1)
        assert types.tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (LENGTH - second - 1)
        assert (ids[second + 1 :] == special.padding).all() and 1 < first < second - 1
    # Half of them, to within 4 standard deviations.
    assert abs(batch.pair_labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(batch.pair_labels))


def halves(ids, special):
    first, second = np.flatnonzero(ids == special.separator)
    return ids[1:first].tolist(), ids[first + 1 : second].tolist()


def test_sentence_order_pairs_are_the_text_or_the_text_turned_around(make_samples, special, train_documents):
    samples = make_samples("mlm", "sop", masking=MaskingSection(probability=0.0))
    texts = ["," + ",".join(map(str, document.tolist())) + "," for document in train_documents]
    batch = samples.batch(np.arange(samples.size))
    for ids, label in zip(batch.input_ids, batch.pair_labels, strict=True):
        a, b = halves(ids, special)
        text = "," + ",".join(map(str, b + a if label else a + b)) + ","
        assert any(text in document for document in texts)


def test_the_second_of_a_next_sentence_pair_is_what_follows_or_is_another_documents(make_samples, special):
    samples = make_samples("mlm", "nsp", masking=MaskingSection(probability=0.0))
    numbers = np.arange(samples.size)
    places = samples.order.place(numbers)
    batch = samples.batch(numbers)
    for label, origins in zip(batch.pair_labels, samples.origins(places), strict=True):
        (a, b) = origins
        same = (a.shard, a.document) == (b.shard, b.document)
        assert same == (label == 0)
        if same:
            assert a.first + a.tokens == b.first


@pytest.mark.parametrize(("objective", "packing"), ALL)
def test_a_batch_is_its_rows_in_any_order_and_the_same_every_time(make_samples, objective, packing):
    samples, again = make_samples(objective, packing), make_samples(objective, packing)
    numbers = np.array([3, 0, 17, samples.size + 2, 5])
    batch, turned = samples.batch(numbers), again.batch(numbers[::-1])
    alone = [again.batch(numbers[i : i + 1]) for i in range(len(numbers))]
    for name in ("input_ids", "labels", "token_types", "pair_labels"):
        value = getattr(batch, name)
        if value is None:
            continue
        assert np.array_equal(value, getattr(turned, name)[::-1])
        assert np.array_equal(value, np.concatenate([getattr(one, name) for one in alone]))
    parts = [one.boundaries[:-1] + i * LENGTH for i, one in enumerate(alone)]
    assert np.array_equal(batch.boundaries, np.append(np.concatenate(parts), len(numbers) * LENGTH))


@pytest.mark.parametrize(("objective", "packing"), ALL)
def test_validation_samples_hold_no_training_document(make_samples, objective, packing):
    train, held_out = (make_samples(objective, packing, split) for split in ("train", "validation"))
    seen = []
    for samples in (train, held_out):
        places = Places(*(np.zeros(samples.size, np.int64) for _ in range(2)), np.arange(samples.size))
        seen.append({(s.shard, s.document) for row in samples.origins(places) for s in row})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_boundaries_are_where_documents_begin(make_samples, special):
    batch = make_samples("causal", length=128).batch(np.arange(8))
    expected = sorted({*range(0, 8 * 128, 128), *np.flatnonzero(batch.input_ids == special.end_of_document).tolist()})
    assert batch.boundaries.tolist() == [*expected, 8 * 128] and len(expected) > 8
    assert batch.longest == np.diff(batch.boundaries).max()
    masked = make_samples("mlm", length=128, masking=MaskingSection(probability=0.0)).batch(np.arange(8))
    behind = np.flatnonzero(masked.input_ids[:, :-2] == special.separator)
    expected = sorted({*range(0, 8 * 128, 128), *(128 * (behind // 126) + behind % 126 + 1).tolist()})
    assert masked.boundaries.tolist() == [*expected, 8 * 128]


@pytest.mark.parametrize(
    ("objective", "packing", "expected"),
    [("causal", "concatenate", False), ("causal", "best_fit", False), ("mlm", "concatenate", False)],
)
def test_without_document_attention_rows_are_seen_whole(make_samples, objective, packing, expected):
    batch = make_samples(objective, packing, document_attention=False).batch(np.arange(8))
    assert batch.boundaries is None and batch.longest == LENGTH


def test_padding_of_masked_rows_is_kept_from_the_others_also_without_document_attention(make_samples, special):
    batch = whole_epoch(make_samples("mlm", "full_sentences", document_attention=False))
    for row, begin, end in documents_of(batch):
        assert begin == 0 or (batch.input_ids[row, begin:end] == special.padding).all()


def test_masked_samples_are_framed_and_masks_never_touch_special_tokens(make_samples, special):
    samples = make_samples("mlm", masking=MaskingSection(probability=1.0, mask=1.0, random=0.0))
    batch = samples.batch(np.arange(samples.size))
    assert (batch.input_ids[:, 0] == special.classification).all()
    assert (batch.input_ids[:, -1] == special.separator).all()
    everywhere = np.isin(batch.input_ids, [special.classification, special.separator, special.mask])
    assert everywhere.all(), "with probability 1 every ordinary token is masked, every special one is left"
    assert (batch.labels[batch.input_ids != special.mask] == IGNORED).all()
    ids = [token for token in dataclasses.asdict(special).values() if token is not None]
    assert not np.isin(batch.labels, ids).any()
    assert special.end_of_document not in batch.input_ids


def test_masks_are_drawn_anew_each_epoch_and_are_a_function_of_seed_and_sample(make_samples):
    samples, other = make_samples("mlm"), make_samples("mlm", seed=4321)
    numbers = np.arange(8)
    first = samples.batch(numbers)
    places = samples.order.place(np.arange(2 * samples.size)).sample
    second_time = samples.size + int(np.flatnonzero(places[samples.size :] == places[0])[0])
    assert not np.array_equal(first.labels[0], samples.batch(np.array([second_time])).labels[0])
    assert not np.array_equal(first.labels, other.batch(numbers).labels)


def test_rates_follow_their_schedules(make_samples):
    masking = MaskingSection(probability={0: 0.4, 100: 0.1}, mask={0: 1.0, 100: 0.0}, random=0.0)
    samples = make_samples("mlm", masking=masking)
    shares = [samples.batch(np.arange(samples.size), step).target_count for step in (0, 50, 100, 200)]
    ordinary = samples.batch(np.arange(samples.size)).input_ids.size * 0.9
    for share, expected in zip(shares, (0.4, 0.25, 0.1, 0.1), strict=True):
        assert abs(share / ordinary - expected) < 0.03
    late = samples.batch(np.arange(8), 150)
    assert np.array_equal(late.input_ids.reshape(-1)[late.targets], late.target_ids), "none is shown as the mask"


def test_goldfish_padding_and_the_token_behind_an_end_are_no_targets(make_samples, special):
    plain = whole_epoch(make_samples("causal", "best_fit"))
    assert ((plain.labels == IGNORED).sum(axis=1) > 0).any(), "there is padding"
    dropped = whole_epoch(make_samples("causal", "best_fit", causal=CausalSection(goldfish_k=4, goldfish_context=3)))
    assert np.array_equal(plain.input_ids, dropped.input_ids)
    kept = dropped.labels != IGNORED
    assert np.array_equal(dropped.labels[kept], plain.labels[kept])
    late = (plain.labels != IGNORED).sum()
    assert 0.7 * late < kept.sum() < 0.9 * late
    behind = whole_epoch(make_samples("causal", causal=CausalSection(loss_after_end=False)))
    all_of_them = whole_epoch(make_samples("causal"))
    after_end = behind.input_ids == special.end_of_document
    assert np.array_equal(behind.labels == IGNORED, after_end) and after_end.any()
    assert np.array_equal(behind.labels[~after_end], all_of_them.labels[~after_end])


def test_fill_in_the_middle_turns_documents_and_leaves_their_place(make_samples, special):
    sentinels = Sentinels(prefix=760, middle=761, suffix=762)
    for packing in CAUSAL_PACKINGS:
        plain = whole_epoch(make_samples("causal", packing))
        turned = whole_epoch(make_samples("causal", packing, causal=CausalSection(fim_rate=1.0), sentinels=sentinels))
        assert np.array_equal(plain.boundaries, turned.boundaries)
        assert np.array_equal(plain.labels == IGNORED, turned.labels == IGNORED)
        changed = 0
        for row, begin, end in documents_of(turned):
            inputs, labels = turned.input_ids[row, begin:end], turned.labels[row, begin:end]
            if labels[0] == sentinels.prefix:
                changed += 1
                assert inputs[0] == special.end_of_document, "nothing stands before the prefix's token"
                assert {760, 761, 762} <= set(labels.tolist())
            if (labels >= 0).all():
                assert np.array_equal(inputs[1:], labels[:-1])
        assert changed > 20


def test_a_sample_grows_with_the_curriculum_and_loses_no_token(make_samples):
    curriculum = CurriculumSection(start_length=8, length_steps=100, length_multiple=8)
    assert [stretch_length(curriculum, 32, step) for step in (0, 33, 34, 67, 99, 100, 5000)] == [
        8,
        8,
        16,
        24,
        24,
        32,
        32,
    ]
    samples = make_samples("causal", document_attention=False, curriculum=curriculum)
    plain = make_samples("causal").batch(np.arange(4))
    early, late = samples.batch(np.arange(4), 0), samples.batch(np.arange(4), 100)
    assert early.boundaries.tolist() == list(range(0, 129, 8)) and early.longest == 8
    assert late.boundaries is None
    for batch in (early, late):
        assert np.array_equal(batch.input_ids, plain.input_ids) and np.array_equal(batch.labels, plain.labels)
    both = make_samples("causal", curriculum=curriculum).batch(np.arange(4), 0)
    assert set(both.boundaries.tolist()) == {*early.boundaries.tolist(), *plain.boundaries.tolist()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_takes_each_held_out_sample_once_and_ranks_stay_in_step(make_samples, world):
    samples = make_samples("causal", split="validation")
    count = samples.size - 1
    plan = BatchPlan(4 * world, 4, 1, world)
    shares = [list(validation_batches(samples, count, plan, rank)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sum(batch.target_count for share in shares for batch in share) == count * LENGTH
    rows = {row.tobytes() for share in shares for batch in share for row in batch.labels if (row != IGNORED).any()}
    assert len(rows) == count


def test_held_out_samples_are_shared_out_evenly_as_far_as_there_are_any(tiny_shards, tiny_tokenizer):
    shards = ShardSet.open(tiny_shards)
    settings = PackSettings("causal", LENGTH, "concatenate", 0.1)
    samples = made_samples({"a": shards, "b": shards}, tiny_tokenizer, settings, "validation")
    size = samples.sizes[0]
    for count in (0, 1, 7, size, 2 * size, 3 * size):
        places = samples.held_out(count)
        counts = np.bincount(places.corpus, minlength=2)
        assert counts.sum() == min(count, 2 * size) and abs(counts[0] - counts[1]) <= 1
        for corpus in (0, 1):
            assert len(np.unique(places.sample[places.corpus == corpus])) == counts[corpus]


def test_corpora_are_read_side_by_side(tiny_shards, tiny_tokenizer):
    """Rows of a blend are those of each corpus alone, masks included."""
    shards = ShardSet.open(tiny_shards)
    settings = PackSettings("mlm", LENGTH, "best_fit", 0.1)
    blended = made_samples({"a": shards, "b": shards}, tiny_tokenizer, settings, stages={0: {"a": 0.25, "b": 0.75}})
    batch = blended.batch(np.arange(40))
    assert np.bincount(batch.places.corpus).tolist() == [10, 30]
    for index, name in enumerate("ab"):
        alone = made_samples({name: shards}, tiny_tokenizer, settings).batch(np.arange((10, 30)[index]))
        assert np.array_equal(batch.input_ids[batch.places.corpus == index], alone.input_ids)
        assert np.array_equal(batch.labels[batch.places.corpus == index], alone.labels)


def test_mlm_without_a_mask_token_is_refused(tiny_shards, tiny_tokenizer, tmp_path):
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"mask_token"', '"no_mask_token"'))
    with pytest.raises(UserError, match="no mask"):
        made_samples({"a": ShardSet.open(tiny_shards)}, folder, PackSettings("mlm", LENGTH))


def test_a_longer_run_leaves_the_prefix_as_it_was(make_samples):
    """No number of steps enters: the same numbers are the same samples in a run of any length."""
    plan, sizes = BatchPlan(8, 4, 1, 2), BatchSizes({0: 8})
    first = [step_batches(make_samples("mlm"), step, sizes, plan, 1) for step in range(3)]
    again = [step_batches(make_samples("mlm"), step, sizes, plan, 1) for step in range(30)]
    for before, after in zip(first, again[:3], strict=True):
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(before, after, strict=True))


def test_batches_made_ahead_come_in_order_and_an_error_reaches_the_loop(make_samples):
    import torch

    samples = make_samples("causal")

    def make(step):
        if step == 3:
            raise UserError("shard 7 is gone")
        return [samples.batch(np.array([step]))]

    ahead = Ahead(make, 0, 10, torch.device("cpu"))
    for step in range(3):
        (batch,), waited = ahead.next()
        assert batch.input_ids.tolist() == make(step)[0].input_ids.tolist() and waited >= 0
        assert batch.input_ids.dtype == torch.int64
    with pytest.raises(RankError, match="shard 7"):
        ahead.next()
    ahead.close()


@pytest.mark.parametrize(
    ("objective", "packing"), [("causal", "concatenate"), ("causal", "best_fit"), ("mlm", "best_fit")]
)
def test_a_document_has_the_logits_that_it_has_alone(make_samples, tiny_tokenizer, objective, packing):
    """From the shards to the model: each document of a batch as it was packed, and as a row of its own."""
    import torch

    from pipeline.attention import document_arguments
    from pipeline.model import build_model, make_model_config
    from pipeline.recipe import check_recipe

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128}
    bert = {"base": "bert-base", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    raw = {
        "objective": objective,
        "model": {
            "config": {"base": "demo-gpt", **sizes} if objective == "causal" else {**bert, "intermediate_size": 64}
        },
        "data": {"shards": "s", "tokenizer": str(tiny_tokenizer), "sequence_length": 128},
        "training": {"global_batch_size": 1, "max_steps": 1},
        "optimizer": {"lr": 1e-3},
    }
    config = make_model_config(check_recipe(raw, "test"), load_tokenizer_info(tiny_tokenizer))
    model = build_model(config, objective, 1).eval()
    batch = make_samples(objective, packing, length=128).batch(np.arange(4))
    ids = torch.from_numpy(batch.input_ids.astype(np.int64))
    boundaries = torch.from_numpy(batch.boundaries)
    with torch.no_grad():
        arguments = document_arguments(boundaries, batch.longest, tuple(ids.shape), config, torch.float32)
        packed = model(input_ids=ids, **arguments).logits
        documents = documents_of(batch)
        assert len(documents) > len(ids)
        for row, begin, end in documents:
            alone = model(input_ids=ids[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-4, atol=2e-6)
