"""Masks: the share that was asked for at every place, whole words and spans, no special token, each row for itself."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep import __main__ as data_prep_main
from data_prep.encoding import SpecialTokens, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.randomness import hash64, hash64_rows
from pipeline.masking import Masking, MaskRates, span_lengths, span_start_rates
from pipeline.words import special_ids, word_starts

SPECIAL = SpecialTokens(end_of_document=5, padding=1, classification=2, separator=3, mask=4, unknown=0)
MASK, SPECIALS, VOCABULARY = 4, 6, 106
# Of the ordinary ids the odd ones continue a word: half of the tokens, words of one piece and of several.
STARTS = np.arange(VOCABULARY) % 2 == 0
STARTS[:SPECIALS] = True
UNITS = ("token", "word", "span")
PAPER = MaskRates(0.15, 0.8, 0.1)
EVERYTHING_SHOWN = MaskRates(0.15, 0.0, 0.0)


def masking(unit, **changes):
    given = {"special": SPECIAL, "vocab_size": VOCABULARY, "word_starts": STARTS}
    return Masking(unit=unit, **(given | changes))


def random_rows(rows, length, seed=0, specials=0.0):
    generator = np.random.default_rng(seed)
    ids = generator.integers(SPECIALS, VOCABULARY, (rows, length))
    scattered = generator.random((rows, length)) < specials
    ids[scattered] = generator.integers(0, SPECIALS, np.count_nonzero(scattered))
    return ids


def keys_of(rows, seed=0):
    return hash64(99, seed, np.arange(rows))


def words_of(row, starts=None):
    """The words of one row, as lists of positions, grouped one token after the other."""
    words = []
    for position, token in enumerate(row):
        alone = token < SPECIALS or (position and row[position - 1] < SPECIALS) or not position
        if alone or STARTS[token] or (starts is not None and starts[position]):
            words.append([])
        words[-1].append(position)
    return words


def stretches_of(row, starts=None):
    """The stretches of ordinary words of one row between its special tokens and the beginnings of its parts."""
    stretches = []
    for word in words_of(row, starts):
        first = word[0]
        if row[first] < SPECIALS:
            continue
        if not first or row[first - 1] < SPECIALS or (starts is not None and starts[first]):
            stretches.append([])
        stretches[-1].append(word)
    return stretches


def assert_share(counts, sizes, share, deviations=4.5):
    """The counts of independent rows add up to `share` of the sizes, within so many deviations that they show."""
    surplus = np.asarray(counts) - share * np.asarray(sizes)
    assert abs(surplus.sum()) < deviations * np.sqrt((surplus**2).sum())


def test_rows_of_hashes_are_splitmix64():
    # The first outputs for the seed 1234567, as published with other implementations of the generator.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hash64_rows(np.array([1234567], dtype=np.uint64), 5).tolist() == [known]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.4, 0.9])
def test_the_share_of_targets_is_the_probability(unit, probability):
    ids = random_rows(400, 256, specials=0.03)
    ordinary = ids >= SPECIALS
    targets, _ = masking(unit).apply(ids.copy(), keys_of(400), MaskRates(probability, 0.8, 0.1), None)
    counts = np.bincount(targets // 256, minlength=400)
    assert_share(counts, ordinary.sum(axis=1), probability)
    if unit == "token":
        expected = probability * ordinary.sum()
        assert abs(len(targets) - expected) < 4.5 * np.sqrt(expected * (1 - probability))


@pytest.mark.parametrize("unit", ["word", "span"])
def test_every_place_of_a_row_is_a_target_equally_often(unit):
    """Also its first words, which no span reaches from before the row, and its last ones: binomial bounds."""
    rows, length = 20_000, 24
    ids = random_rows(rows, length) // 2 * 2  # words of one piece
    targets, _ = masking(unit).apply(ids, keys_of(rows), EVERYTHING_SHOWN, None)
    shares = np.bincount(targets % length, minlength=length) / rows
    assert np.abs(shares - 0.15).max() < 4.5 * np.sqrt(0.15 * 0.85 / rows)


@pytest.mark.parametrize("unit", UNITS)
def test_targets_are_shown_as_the_rates_say(unit):
    ids = random_rows(3000, 128)
    shown = ids.copy()
    targets, originals = masking(unit).apply(shown, keys_of(3000), PAPER, None)
    assert np.array_equal(originals, ids.ravel()[targets])
    untouched = np.ones(ids.size, dtype=bool)
    untouched[targets] = False
    assert np.array_equal(shown.ravel()[untouched], ids.ravel()[untouched])
    row, now = targets // 128, shown.ravel()[targets]
    per_row = np.bincount(row, minlength=3000)
    assert_share(np.bincount(row[now == MASK], minlength=3000), per_row, 0.8)
    # A random token is the one that was there once in the 100 ordinary ids.
    replaced = (now != MASK) & (now != originals)
    assert_share(np.bincount(row[replaced], minlength=3000), per_row, 0.1 * 0.99)


@pytest.mark.parametrize("unit", UNITS)
def test_random_tokens_are_uniform_over_the_ordinary_ids(unit):
    ids = random_rows(1500, 128)
    shown = ids.copy()
    targets, originals = masking(unit).apply(shown, keys_of(1500), MaskRates(0.5, 0.4, 0.3), None)
    drawn = shown.ravel()[targets]
    counts = np.bincount(drawn[(drawn != MASK) & (drawn != originals)], minlength=VOCABULARY)
    assert not counts[:SPECIALS].any()
    expected = counts.sum() / (VOCABULARY - SPECIALS)
    # Chi-square with 99 degrees of freedom, 99.9 % bound.
    assert ((counts[SPECIALS:] - expected) ** 2 / expected).sum() < 148.2


@pytest.mark.parametrize("unit", UNITS)
@given(
    ids=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=17, max_size=17), min_size=1, max_size=5),
    key=st.integers(0, 2**64 - 1),
    begins=st.lists(st.integers(0, 16), max_size=4),
    probability=st.sampled_from([0.0, 0.15, 0.7, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_special_tokens_are_never_touched_nor_drawn(unit, ids, key, begins, probability):
    ids = np.array(ids)
    shown, starts = ids.copy(), np.zeros(ids.shape, dtype=bool)
    starts[:, begins] = True
    keys = hash64(key, np.arange(len(ids)))
    targets, originals = masking(unit).apply(shown, keys, MaskRates(probability, 0.4, 0.5), starts)
    assert (originals >= SPECIALS).all()
    assert (np.diff(targets) > 0).all()
    is_special = ids < SPECIALS
    assert np.array_equal(shown[is_special], ids[is_special])
    drawn = shown.ravel()[targets]
    assert ((drawn >= SPECIALS) | (drawn == MASK)).all()
    if probability in (0, 1):
        assert len(targets) == probability * np.count_nonzero(~is_special)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_row_is_masked_alike_alone_in_a_batch_and_in_any_type(unit, dtype):
    ids, keys = random_rows(7, 65, specials=0.05), keys_of(7)
    starts = np.random.default_rng(3).random(ids.shape) < 0.05
    together = ids.copy()
    targets, originals = masking(unit).apply(together, keys, MaskRates(0.3, 0.5, 0.3), starts)
    for row in range(7):
        alone = ids[row : row + 1].astype(dtype)
        own, there = masking(unit).apply(alone, keys[row : row + 1], MaskRates(0.3, 0.5, 0.3), starts[row : row + 1])
        assert alone.dtype == there.dtype == dtype
        assert np.array_equal(alone[0], together[row])
        mine = targets // 65 == row
        assert np.array_equal(own, targets[mine] - row * 65)
        assert np.array_equal(there, originals[mine])


def test_another_key_masks_another_way_and_a_longer_row_begins_alike():
    ids = np.repeat(random_rows(1, 400), 2, axis=0)
    targets, _ = masking("token").apply(ids.copy(), keys_of(2), PAPER, None)
    first, second = (set(targets[targets // 400 == row] % 400) for row in (0, 1))
    # Two independent choices of 60 of 400 have 9 in common on average.
    assert len(first & second) < 25
    shorter, _ = masking("token").apply(np.ascontiguousarray(ids[:1, :300]), keys_of(1), PAPER, None)
    assert set(shorter) == {position for position in first if position < 300}


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_taken_or_left_with_all_their_pieces(unit):
    ids = random_rows(300, 64, specials=0.05)
    starts = np.random.default_rng(3).random(ids.shape) < 0.05
    targets, _ = masking(unit).apply(ids.copy(), keys_of(300), PAPER, starts)
    taken = np.zeros(ids.shape, dtype=bool)
    taken.ravel()[targets] = True
    several = 0
    for row, begins, chosen in zip(ids, starts, taken, strict=True):
        for word in words_of(row, begins):
            assert chosen[word].all() or not chosen[word].any()
            several += chosen[word].all() and len(word) > 1
    assert several > 300


def test_words_are_chosen_independently_and_their_pieces_shown_each_for_itself():
    ids = np.tile([6, 7], (2000, 32))  # words of two pieces
    shown = ids.copy()
    targets, _ = masking("word").apply(shown, keys_of(2000), MaskRates(0.15, 0.5, 0.0), None)
    words = np.zeros((2000, 32), dtype=bool)
    words.ravel()[targets[::2] // 2] = True
    neighbours = words[:, 1:] & words[:, :-1]
    assert_share(neighbours.sum(axis=1), np.full(2000, 31), 0.15**2)
    masked = (shown.ravel()[targets] == MASK).reshape(-1, 2)
    assert abs((masked[:, 0] != masked[:, 1]).mean() - 0.5) < 4.5 * np.sqrt(0.25 / len(masked))


def test_a_span_is_shown_in_one_way():
    ids = random_rows(500, 128, specials=0.02)
    shown = ids.copy()
    targets, originals = masking("span").apply(shown, keys_of(500), MaskRates(0.15, 0.4, 0.3), None)
    kinds = set()
    now = shown.ravel()[targets]
    runs = np.split(np.arange(len(targets)), np.flatnonzero((np.diff(targets) > 1) | (targets[1:] % 128 == 0)) + 1)
    for run in runs:
        masked, kept = now[run] == MASK, now[run] == originals[run]
        # A random token may be the one that was there.
        kind = "mask" if masked.all() else "kept" if kept.all() and len(run) > 2 else "random"
        assert kind != "random" or not masked.any()
        kinds.add(kind)
    assert kinds == {"mask", "kept", "random"}


def test_spans_that_touch_are_one_but_not_across_the_beginning_of_a_part():
    ids = np.full((1000, 10), 6)
    starts = np.zeros(ids.shape, dtype=bool)
    starts[:, 4] = True
    masking("span").apply(ids, keys_of(1000), MaskRates(1.0, 0.5, 0.0), starts)
    masked = ids == MASK
    assert (masked[:, :4] == masked[:, :1]).all() and (masked[:, 4:] == masked[:, 4:5]).all()
    assert abs((masked[:, 0] != masked[:, 4]).mean() - 0.5) < 4.5 * np.sqrt(0.25 / 1000)


@given(
    key=st.integers(0, 2**64 - 1),
    p=st.sampled_from([0.05, 0.2, 1.0]),
    longest=st.sampled_from([1, 3, 10]),
    probability=st.sampled_from([0.05, 0.15, 0.6]),
    specials=st.sampled_from([0.0, 0.1, 0.9]),
    cut=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_spans_are_those_found_word_by_word(key, p, longest, probability, specials, cut):
    ids = random_rows(4, 60, seed=key, specials=specials)
    starts = np.random.default_rng(key).random(ids.shape) < cut
    keys = hash64(key, np.arange(4))
    rates = span_start_rates(probability, span_lengths(p, longest))
    thresholds = np.cumsum(span_lengths(p, longest))[:-1]
    covered = set()
    for row, hashes in enumerate(hash64_rows(keys, 60).tolist()):
        for stretch in stretches_of(ids[row], starts[row]):
            reached = []
            for number, word in enumerate(stretch):
                choice, length = divmod(hashes[word[0]], 2**32)
                if choice >= round(rates[min(number, len(rates) - 1)] * 2**32):
                    continue
                words = 1 + sum(length >= round(threshold * 2**32) for threshold in thresholds)
                reached += [row * 60 + position for w in stretch[number : number + words] for position in w]
            covered.update(reached)
    shown = ids.copy()
    targets, _ = masking("span", span_p=p, span_max=longest).apply(shown, keys, MaskRates(probability, 0, 0), starts)
    assert targets.tolist() == sorted(covered)


def test_isolated_spans_are_as_long_as_spanberts():
    """So few spans that they hardly meet, in rows of words of one piece: chi-square against the distribution."""
    rows, length = 4000, 256
    ids = random_rows(rows, length) // 2 * 2
    targets, _ = masking("span").apply(ids, keys_of(rows), MaskRates(0.004, 0, 0), None)
    runs = np.split(targets, np.flatnonzero((np.diff(targets) > 1) | (targets[1:] % length == 0)) + 1)
    # Neither those that the end of the row may have cut, nor those that are two.
    lengths = np.array([len(run) for run in runs if run[0] % length < length - 10 and len(run) <= 10])
    expected = np.array(span_lengths(0.2, 10)) * len(lengths)
    # 99.9 % bound for 9 degrees of freedom.
    assert ((np.bincount(lengths, minlength=11)[1:] - expected) ** 2 / expected).sum() < 27.9


def test_the_lengths_of_spans_have_the_mean_of_the_paper():
    lengths = span_lengths(0.2, 10)
    assert sum(lengths) == pytest.approx(1, abs=1e-15)
    assert sum(n * p for n, p in enumerate(lengths, start=1)) == pytest.approx(3.8, abs=0.005)
    assert np.allclose(np.divide(lengths[1:], lengths[:-1]), 0.8)
    assert span_lengths(1.0, 3) == (1, 0, 0)
    assert span_lengths(0.2, 1) == (1,)


@pytest.mark.parametrize("probability", [1e-6, 0.15, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("p", "longest"), [(0.2, 10), (1.0, 10), (0.2, 1), (0.01, 40)])
def test_start_rates_cover_every_word_with_the_probability(probability, p, longest):
    lengths = np.array(span_lengths(p, longest))
    rates = span_start_rates(probability, tuple(lengths))
    assert all(0 <= rate <= probability + 1e-15 for rate in rates)
    rates = [*rates, *[rates[-1]] * 3 * longest]
    for word in range(len(rates)):
        left = 1.0
        for before in range(min(word, longest - 1) + 1):
            left *= 1 - rates[word - before] * lengths[before:].sum()
        assert 1 - left == pytest.approx(probability, abs=1e-9)


def test_words_and_spans_by_hand():
    # [CLS] ##7 8 ##9 [SEP] ##7 ##9 | ##11 12: what is left of a cut word is a word of its own.
    ids = np.array([[2, 7, 8, 9, 3, 7, 9, 11, 12]])
    starts = np.array([[1, 0, 0, 0, 0, 0, 0, 1, 0]], dtype=bool)
    assert words_of(ids[0], starts[0]) == [[0], [1], [2, 3], [4], [5, 6], [7], [8]]
    chosen = set()
    for key in range(400):
        targets, _ = masking("word").apply(ids.copy(), keys_of(1, key), EVERYTHING_SHOWN, starts)
        chosen.add(tuple(targets))
    for word in ([1], [2, 3], [5, 6], [7], [8]):
        assert tuple(word) in chosen
    two = masking("span", span_p=1e-9, span_max=2)  # of one word or of two, equally often
    spans = set()
    for key in range(400):
        targets, _ = two.apply(ids.copy(), keys_of(1, key), EVERYTHING_SHOWN, starts)
        spans.update(tuple(run) for run in np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1) if len(run))
    # The last two touch across the beginning of the part.
    assert spans == {(1,), (1, 2, 3), (2, 3), (5, 6), (7,), (7, 8), (8,), (5, 6, 7), (5, 6, 7, 8)}


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_to_mask_gives_no_targets(unit):
    for ids in (np.full((2, 9), 3), np.empty((0, 9), dtype=np.int64), np.empty((3, 0), dtype=np.int64)):
        shown = ids.copy()
        targets, originals = masking(unit).apply(shown, keys_of(len(ids)), MaskRates(1.0, 0.0, 1.0), None)
        assert targets.dtype == np.int64
        assert len(targets) == len(originals) == 0
        assert np.array_equal(shown, ids)


@pytest.mark.parametrize("unit", UNITS)
def test_a_single_ordinary_id_is_replaced_by_itself(unit):
    few = masking(unit, vocab_size=7, word_starts=STARTS[:7])
    ids = np.full((3, 50), 6)
    targets, _ = few.apply(ids, keys_of(3), MaskRates(0.5, 0.0, 1.0), None)
    assert len(targets) > 30
    assert (ids == 6).all()


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_without_a_role_are_special(unit):
    ids = random_rows(50, 100)
    shown = ids.copy()
    more = masking(unit, further_special=[10, 105])
    targets, originals = more.apply(shown, keys_of(50), MaskRates(1.0, 0.0, 1.0), None)
    assert len(targets) == np.count_nonzero((ids != 10) & (ids != 105))
    assert not np.isin(originals, [10, 105]).any()
    assert not np.isin(shown.ravel()[targets], [10, 105]).any()


def test_masking_without_a_mask_token_is_refused():
    with pytest.raises(UserError, match="no mask token"):
        masking("token", special=SpecialTokens(5, 1, 2, 3, None, 0))


# Words of a vocabulary ---------------------------------------------------------------------------------------------

PROSE = (
    "Masks are drawn anew, for each epoch; they're a function of (seed, sample) alone -- see masked_rows() in 2,024.",
    'The naïve reader\'s précis:\n\n\tfor x in range(10):\n        yield "a b"  # Ω ≈ 3.14…\n',
    "日本語のテキスト and Привет, мир! Fußgänger 👍🏽 e\u0301te\u0301 ½ © naïveté",
)
SPECIAL_TOKEN, ADDED_TOKEN = "<｜s▁t｜>", "lower"
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_corpus, tiny_tokenizer, tiny_texts):
    root = tmp_path_factory.mktemp("words")
    for kind, size in (("unigram", 420), ("wordpiece", 400)):
        flags = f"--input {tiny_corpus}/*.jsonl --output_dir {root / kind} --type {kind} --vocab_size {size}"
        data_prep_main.run_stage("train_tokenizer", flags.split())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*tiny_texts, *PROSE], trainer)
    (root / "byte_level").mkdir()
    tokenizer.save(str(root / "byte_level" / "tokenizer.json"))
    return {"bpe": tiny_tokenizer} | {kind: root / kind for kind in ("unigram", "wordpiece", "byte_level")}


def encoded(folder, texts):
    """Of each text: whether its tokens begin words by the vocabulary, and the encoding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    starts = word_starts(folder)
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        yield text, starts[encoding.ids], encoding


def begins_pre_token(encoding):
    numbers = np.array(encoding.word_ids)
    return np.concatenate(([True], numbers[1:] != numbers[:-1]))


def test_word_starts_of_wordpiece_are_those_of_its_pre_tokenization(folders, tiny_texts):
    for _, ours, encoding in encoded(folders["wordpiece"], [*tiny_texts, *PROSE]):
        assert np.array_equal(ours, begins_pre_token(encoding))


def test_every_pre_token_of_sentencepiece_begins_a_word(folders, tiny_texts):
    for _, ours, encoding in encoded(folders["bpe"], [*tiny_texts, *PROSE]):
        assert ours[1:][begins_pre_token(encoding)[1:]].all()


def test_byte_level_words_are_pre_tokens_but_for_letters_behind_punctuation_and_pieces_of_runs(folders, tiny_texts):
    for text, ours, encoding in encoded(folders["byte_level"], [*tiny_texts, *PROSE[:2]]):
        begins = np.array([start for start, _ in encoding.offsets])
        first, before = np.array(list(text))[begins], np.array(list(" " + text))[begins]
        theirs = begins_pre_token(encoding)
        theirs[0] = ours[0]
        assert all(map(str.isalpha, first[theirs & ~ours]))
        assert not any(map(str.isalpha, before[theirs & ~ours]))
        assert not any(character.isascii() and character.isalpha() for character in first[ours & ~theirs])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte_level"])
def test_a_word_begins_where_the_text_says_so(folders, tiny_texts, kind):
    """At tokens of whole characters: at all but letters, and at letters of scripts without spaces."""
    tokenizer = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    checked = 0
    for text, ours, encoding in encoded(folders[kind], [*tiny_texts, *PROSE]):
        for token, begins, (start, end) in zip(encoding.ids, ours, encoding.offsets, strict=True):
            if tokenizer.decode([token]) == text[start:end]:
                character = text[start]
                goes_on = character.isalpha() and not unicodedata.name(character).startswith(UNSPACED)
                assert begins != (goes_on or unicodedata.combining(character) > 0 or character == "\u200d")
                checked += 1
    assert checked > 5000


def made_tokenizer(folder, pieces, model, **parts):
    """Its pieces between a special and an added token, which the vocabulary holds as well."""
    vocabulary = {piece: i for i, piece in enumerate([SPECIAL_TOKEN, *pieces, ADDED_TOKEN])}
    added = [
        {"id": vocabulary[SPECIAL_TOKEN], "content": SPECIAL_TOKEN, "special": True},
        {"id": vocabulary[ADDED_TOKEN], "content": ADDED_TOKEN, "special": False},
    ]
    raw = {"added_tokens": added, "model": {"vocab": vocabulary, **model}, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


SENTENCEPIECE = {"decoder": {"type": "Metaspace", "replacement": "\u2581"}}
BYTE_LEVEL = {"pre_tokenizer": {"type": "ByteLevel"}}


@pytest.mark.parametrize(
    ("model", "parts", "begin", "go_on"),
    [
        (
            {"type": "Unigram"},
            SENTENCEPIECE,
            [
                "\u2581the",
                "\u2581",
                ".",
                ",a",
                "'s",
                "12",
                "_",
                "日本",
                "の",
                "\n",
                "<0x0A>",
                "<0xF0>",
                "<0xE6>",
                "👍",
                "ไทย",
            ],
            ["ing", "é", "éa", "\u0301", "Ж", "<0xC3>", "<0xA9>", "<0xD0>", "\u200d", "ー", "\u0e34"],
        ),
        (
            {"type": "BPE"},
            BYTE_LEVEL,
            ["Ġthe", "Ġ", "Ċ", "ĉ", ".", ",a", "'s", "12", "æĹ¥", "æĹ", "ðŁ", "âĢ¦", "｜x"],
            ["ing", "Ã©", "Ã", "©", "Ð", "¥", "Ģ", "Ì", "Ìģ", "à¸"],
        ),
        (
            {"type": "WordPiece", "continuing_subword_prefix": "##"},
            {},
            ["the", ".", "##", "#"],
            ["##ing", "##.", "##日"],
        ),
        ({"type": "BPE", "continuing_subword_prefix": "@@"}, {}, ["the", "##ing"], ["@@ing"]),
    ],
)
def test_which_pieces_begin_words(tmp_path, model, parts, begin, go_on):
    folder = made_tokenizer(tmp_path, [*begin, *go_on], model, **parts)
    starts = word_starts(folder)
    expected = dict.fromkeys([SPECIAL_TOKEN, *begin, ADDED_TOKEN], True) | dict.fromkeys(go_on, False)
    assert dict(zip([SPECIAL_TOKEN, *begin, *go_on, ADDED_TOKEN], starts.tolist(), strict=True)) == expected
    assert special_ids(folder).tolist() == [0]


def test_word_starts_cover_the_vocabulary_and_special_tokens_begin_words(folders):
    for kind in ("bpe", "unigram", "wordpiece"):
        info = load_tokenizer_info(folders[kind])
        starts = word_starts(folders[kind])
        assert starts.shape == (info.vocab_size,)
        roles = [token for token in vars(info.special).values() if token is not None]
        assert starts[roles].all()
        assert sorted(special_ids(folders[kind])) == sorted(roles)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"type": "WordLevel"}, {}),
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, {}),
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, BYTE_LEVEL),
    ],
)
def test_tokenizers_whose_pieces_do_not_tell_are_refused(tmp_path, model, parts):
    folder = made_tokenizer(tmp_path, ["the", "ing</w>"], model, **parts)
    with pytest.raises(UserError, match=rf"{model['type']} do not tell where words begin.*masking\.unit"):
        word_starts(folder)
