"""Fill-in-the-middle moves a text's sections and loses three tokens; goldfish leaves out the same tokens of a text."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.causal import FEWEST_TEXT_TOKENS, Sentinels, fill_in_the_middle, find_sentinels, goldfish

PREFIX, MIDDLE, SUFFIX, END = 100, 101, 102, 5
SENTINELS = Sentinels(prefix=PREFIX, middle=MIDDLE, suffix=SUFFIX)
TEXT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def filled(labels, boundaries, keys, eligible=None, rate=1.0, spm_rate=0.5):
    labels, boundaries = np.array(labels), np.array(boundaries, dtype=np.int32)
    eligible = np.ones(len(boundaries) - 1, dtype=bool) if eligible is None else np.array(eligible)
    keys = np.array(keys, dtype=np.uint64)
    fill_in_the_middle(
        labels,
        boundaries,
        keys,
        eligible,
        rate=rate,
        spm_rate=spm_rate,
        sentinels=SENTINELS,
        end_of_document=END,
    )
    return labels


def undone(part):
    """The text that is left of a part, read from its sentinels alone, in either order."""
    part = list(part[:-1] if part[-1] == END else part)
    assert [part.count(token) for token in (PREFIX, MIDDLE, SUFFIX)] == [1, 1, 1]
    assert part[0] == PREFIX
    at_suffix, at_middle = part.index(SUFFIX), part.index(MIDDLE)
    assert at_suffix < at_middle
    before, suffix, after = part[1:at_suffix], part[at_suffix + 1 : at_middle], part[at_middle + 1 :]
    return before + after + suffix


def rows_of_parts(generator, batch, sequence, extra=6):
    """labels [batch, sequence] whose parts end with END but for those cut by the row's end, and their boundaries."""
    labels = generator.integers(6, 100, (batch, sequence)).astype(np.uint16)
    inner = generator.choice(np.arange(1, batch * sequence), extra * batch, replace=False)
    boundaries = np.unique(np.concatenate([np.arange(0, batch * sequence + 1, sequence), inner]))
    labels.reshape(-1)[inner - 1] = END
    return labels, boundaries.astype(np.int32)


def parts_of(labels, boundaries):
    return np.split(labels.reshape(-1), boundaries[1:-1])


def mixed(*coordinates):
    """`hash64` in Python's integers, from the paper: SplitMix64's finalizer, chained over the coordinates."""
    golden, word, state = 0x9E3779B97F4A7C15, 2**64 - 1, 0
    for coordinate in coordinates:
        state = ((state + golden) & word) ^ (coordinate * golden & word)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ state >> 27) * 0x94D049BB133111EB & word
        state ^= state >> 31
    return state


@pytest.mark.parametrize("end", [[END], []])
def test_both_orders_are_the_papers_by_hand(end):
    labels = [TEXT + end]
    for key in range(40):
        first, second = sorted((mixed(key, 0, cut) >> 11) * 8 >> 53 for cut in (2, 3))
        prefix, middle, suffix = TEXT[:first], TEXT[first:second], TEXT[second:7]
        psm = [PREFIX, *prefix, SUFFIX, *suffix, MIDDLE, *middle, *end]
        spm = [PREFIX, SUFFIX, *suffix, MIDDLE, *prefix, *middle, *end]
        assert filled(labels, [0, len(labels[0])], [key], spm_rate=0.0).tolist() == [psm]
        assert filled(labels, [0, len(labels[0])], [key], spm_rate=1.0).tolist() == [spm]


def test_one_key_gives_these_tokens_for_ever():
    """A resumed run needs the same ones from a later version."""
    labels, boundaries, key = [[*TEXT, END, 20, 21, 22, 23, 24, 25, 26]], [0, 11, 18], [2038]
    document = [PREFIX, 10, 11, SUFFIX, 15, 16, MIDDLE, 12, 13, 14, END]
    beginning_of_another = [PREFIX, 20, 21, 22, SUFFIX, MIDDLE, 23]
    assert filled(labels, boundaries, key, spm_rate=0.0).tolist() == [document + beginning_of_another]
    document = [PREFIX, SUFFIX, 15, 16, MIDDLE, 10, 11, 12, 13, 14, END]
    beginning_of_another = [PREFIX, SUFFIX, MIDDLE, 20, 21, 22, 23]
    assert filled(labels, boundaries, key, spm_rate=1.0).tolist() == [document + beginning_of_another]


@given(seed=st.integers(0, 2**32), rate=st.sampled_from([0.0, 0.5, 1.0]), dtype=st.sampled_from(["uint16", "int32"]))
@settings(max_examples=60, deadline=None)
def test_undoing_it_gives_the_text_without_its_last_three_tokens(seed, rate, dtype):
    generator = np.random.default_rng(seed)
    labels, boundaries = rows_of_parts(generator, 4, 64)
    labels = labels.astype(dtype)
    eligible = generator.random(len(boundaries) - 1) < 0.8
    changed = filled(labels, boundaries, generator.integers(0, 2**63, 4), eligible, rate=rate)
    assert changed.dtype == dtype
    pairs = zip(parts_of(labels, boundaries), parts_of(changed, boundaries), eligible, strict=True)
    for old, new, may_change in pairs:
        text = old[:-1] if old[-1] == END else old
        assert new[len(text) :].tolist() == old[len(text) :].tolist(), "the end of the document stays where it is"
        if PREFIX in new:
            assert may_change and len(text) >= FEWEST_TEXT_TOKENS
            assert undone(new) == text[:-3].tolist()
        else:
            assert new.tolist() == old.tolist()
            assert rate < 1 or not may_change or len(text) < FEWEST_TEXT_TOKENS


@pytest.mark.parametrize("end", [[], [END]])
def test_a_text_below_six_tokens_is_left_alone(end):
    for length in range(1, 10):
        labels = [TEXT[:length] + end]
        changed = filled(labels, [0, len(labels[0])], [7]).tolist()
        assert (changed != labels) == (length >= FEWEST_TEXT_TOKENS == 6)
    assert filled([[END] * 8], [0, 8], [7]).tolist() != [[END] * 8], "only the last of a part is its end"


def test_rates_and_cuts_are_the_asked_ones():
    count, length = 20_000, 13
    labels = np.tile(np.arange(6, 6 + length, dtype=np.uint16), (count, 1))
    labels[:, -1] = END
    changed = filled(labels, np.arange(count + 1) * length, np.arange(count), rate=0.7, spm_rate=0.3)
    is_changed = changed[:, 0] == PREFIX
    total = is_changed.sum()
    assert abs(total / count - 0.7) < 4 * math.sqrt(0.7 * 0.3 / count)
    spm_like = changed[is_changed, 1] == SUFFIX  # SPM, and PSM with an empty prefix
    lengths = np.argmax(changed == MIDDLE, axis=1) - np.argmax(changed == SUFFIX, axis=1) - 1
    # 9 tokens are left, so each cut is one of 10 places: P(the smaller is 0) = 1 - (9/10)^2.
    expected = 0.3 + 0.7 * 0.19
    assert abs(spm_like.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / total)
    # P(suffix has n tokens) = P(the larger cut is 9 - n) = (2 (9 - n) + 1) / 100: a chi-square of 9 degrees of freedom.
    found = np.bincount(lengths[is_changed], minlength=10)
    wanted = total * (2 * (9 - np.arange(10)) + 1) / 100
    assert ((found - wanted) ** 2 / wanted).sum() < 33.7, "p = 0.0001"


def test_a_row_does_not_depend_on_the_rows_around_it():
    generator = np.random.default_rng(3)
    labels, boundaries = rows_of_parts(generator, 6, 48)
    keys = generator.integers(0, 2**63, 6)
    whole = filled(labels, boundaries, keys, rate=0.6)
    assert (whole != labels).any()
    for row in range(6):
        mine = boundaries[(boundaries >= row * 48) & (boundaries <= (row + 1) * 48)] - row * 48
        assert np.array_equal(filled(labels[row : row + 1], mine, keys[row : row + 1], rate=0.6), whole[row : row + 1])
    same = filled(np.tile(labels[:1], (2, 1)), [0, 48, 96], [keys[0], keys[0] + 1])
    assert not np.array_equal(same[0], same[1]), "another key, other cuts"


def test_parts_of_a_row_are_cut_in_their_own_ways():
    labels = np.tile(np.arange(10, 30), 40)[None]
    changed = filled(labels, np.arange(0, 801, 20), [11], spm_rate=0.0).reshape(40, 20)
    assert len(np.unique(changed, axis=0)) > 30


def test_sentinels_are_found_by_name(tmp_path, tiny_tokenizer):
    vocabulary = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    assert find_sentinels(tiny_tokenizer, prefix="[CLS]", middle="e", suffix="[SEP]") == Sentinels(
        prefix=2, middle=vocabulary["e"], suffix=3
    )
    with pytest.raises(
        UserError, match=r"no token causal.fim_prefix '<PRE>', causal.fim_suffix '<SUF>': .*--special_t"
    ):
        find_sentinels(tiny_tokenizer, prefix="<PRE>", middle="e", suffix="<SUF>")
    with pytest.raises(UserError, match="three different tokens"):
        find_sentinels(tiny_tokenizer, prefix="[CLS]", middle="e", suffix="e")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        find_sentinels(tmp_path, prefix="[CLS]", middle="e", suffix="[SEP]")


def goldfish_by_hand(labels, boundaries, k, context):
    """One label after the other, in Python's integers."""
    flat = labels.reshape(-1).tolist()
    dropped = [False] * len(flat)
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        for position in range(start + context, end):
            window = 0
            for token in reversed(flat[position - context : position]):
                window = (window * 0xD1342543DE82EF95 + token) % 2**64
            dropped[position] = mixed(1, window) < 2**64 // k
    return np.array(dropped).reshape(labels.shape)


@given(
    seed=st.integers(0, 2**32),
    k=st.integers(2, 8),
    context=st.integers(1, 20),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
@settings(max_examples=60, deadline=None)
def test_goldfish_is_the_definition_label_by_label(seed, k, context, dtype):
    generator = np.random.default_rng(seed)
    labels, boundaries = rows_of_parts(generator, 3, 40, extra=2)
    dropped = goldfish(labels.astype(dtype), boundaries, k=k, context=context)
    assert np.array_equal(dropped, goldfish_by_hand(labels, boundaries, k, context))


def test_a_passage_misses_the_same_tokens_wherever_it_is_repeated():
    generator = np.random.default_rng(5)
    labels, boundaries = rows_of_parts(generator, 8, 400, extra=0)
    passage = generator.integers(6, 100, 140)
    places = [(0, 0), (1, 17), (3, 250), (7, 101), (7, 251)]
    for row, column in places:
        labels[row, column : column + 140] = passage
    labels[7, 100] = END
    boundaries = np.sort(np.append(boundaries, 7 * 400 + 101)).astype(np.int32)
    dropped = goldfish(labels, boundaries, k=4, context=13)
    masks = {dropped[row, column + 13 : column + 140].tobytes() for row, column in places}
    assert len(masks) == 1
    assert 0 < np.frombuffer(masks.pop(), dtype=bool).sum() < 127
    assert not dropped[0, :13].any() and not dropped[7, 101:114].any(), "too few labels before them in their part"


def test_goldfish_sees_the_labels_before_a_label_and_nothing_else():
    generator = np.random.default_rng(6)
    labels = generator.integers(6, 30_000, (400, 20)).astype(np.uint16)
    boundaries = np.arange(0, 8001, 20).astype(np.int32)
    before = goldfish(labels, boundaries, k=2, context=13)
    for column in range(20):
        other = labels.copy()
        other[:, column] += 1
        differ = np.flatnonzero((goldfish(other, boundaries, k=2, context=13) != before).any(axis=0))
        assert differ.tolist() == [p for p in range(13, 20) if p - 13 <= column < p]
    swapped = labels.copy()
    swapped[:, [3, 4]] = labels[:, [4, 3]]
    assert (goldfish(swapped, boundaries, k=2, context=13) != before)[:, 13].any(), "their order counts"


def test_goldfish_never_looks_over_a_boundary():
    generator = np.random.default_rng(7)
    labels, boundaries = rows_of_parts(generator, 4, 60)
    whole = goldfish(labels, boundaries, k=3, context=4)
    alone = [
        goldfish(part[None], np.array([0, len(part)], dtype=np.int32), k=3, context=4)[0]
        for part in parts_of(labels, boundaries)
    ]
    assert np.array_equal(whole.reshape(-1), np.concatenate(alone))
    assert whole.any()


@pytest.mark.parametrize("k", [2, 3, 4, 32, 128])
@pytest.mark.parametrize("words", [7, 50_000])
def test_goldfish_leaves_out_one_label_in_k(k, words):
    """Also of few different tokens: in windows of 13 of 7 tokens there is no second of its kind to be expected."""
    labels = np.random.default_rng(k).integers(0, words, (100, 2000))
    dropped = goldfish(labels, np.arange(0, 200_001, 2000).astype(np.int32), k=k, context=13)
    count = 100 * (2000 - 13)
    assert abs(dropped.sum() / count - 1 / k) < 4 * math.sqrt((1 / k) * (1 - 1 / k) / count)


def test_goldfish_keeps_rows_that_are_no_longer_than_the_context():
    for sequence in (1, 12, 13):
        labels = np.arange(sequence)[None]
        assert not goldfish(labels, np.array([0, sequence], dtype=np.int32), k=2, context=13).any()
