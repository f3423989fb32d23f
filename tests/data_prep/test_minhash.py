"""Hashes of texts: normalization, words, MinHash and bands, against plain Python and the theory's probabilities."""

import itertools
import math
import random
import re
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.minhash import (
    MinHashOptions,
    Texts,
    _permutations,
    composed,
    estimated_similarity,
    exact_hashes,
    normalized,
    options_for,
    signatures,
)

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
MASK = (1 << 64) - 1


def lower(character: str) -> str:
    return character.lower() if len(character.lower()) == 1 else character


def normalized_texts(texts: list[str]) -> list[str]:
    buffer, offsets = normalized(Texts(texts))
    return [bytes(buffer[start:end]).decode() for start, end in itertools.pairwise(offsets)]


# --- the words, as docs/deduplication.md defines them

PUNCTUATION = set(string.punctuation + "«´»–—‘’“”„…∶━►、。〈〉《》「」【】！％（），．：；？［～")
NUMBER = re.compile(r"\d+(?:[.,،٫⎖⎗⎘]\d+)?")


def folded(character: str) -> str:
    """A character as words hold it, "" for a diacritic, " " for a separator."""
    if character.isspace() or character in PUNCTUATION or unicodedata.category(character) == "Cc":
        return " "
    if unicodedata.category(character) == "Mn":
        return ""
    bare = [c for c in unicodedata.normalize("NFD", character.lower()) if unicodedata.category(c) != "Mn"]
    return bare[0] if len(bare) == 1 else lower(character)


def words(text: str) -> list[str]:
    folds = "".join(map(folded, NUMBER.sub("0", text)))
    return [word for word in folds.split(" ") if word]


def mixed(value: int) -> int:
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value ^= value >> 33
        value = value * multiplier & MASK
    return value ^ value >> 33


def word_hash(word: str) -> int:
    value = 0x9E3779B97F4A7C15
    for character in word:
        value = (value ^ ord(character)) * 0xD6E8FEB86659FD93 & MASK
    return mixed(value)


def ngram_hashes(text: str, size: int) -> set[int]:
    hashes = list(map(word_hash, words(text)))
    return {
        mixed(sum(value * pow(0x9FB21C651E98DF25, size - 1 - i, 1 << 64) for i, value in enumerate(gram)) & MASK)
        for gram in (hashes[start : start + size] for start in range(len(hashes) - size + 1))
    }


def naive_band_hashes(text: str, options: MinHashOptions) -> list[int]:
    shingles = [value & 0xFFFFFFFF for value in ngram_hashes(text, options.ngram)]
    minima = [
        min(((a * x + b) & MASK) >> 32 for x in shingles)
        for a, b in zip(*(array.tolist() for array in _permutations(options.permutations)), strict=True)
    ]
    bands = []
    for band in range(options.bands):
        value = mixed(band + 1)
        for minimum in minima[band * options.rows : (band + 1) * options.rows]:
            value = mixed(value ^ minimum)
        bands.append(value)
    return bands


TEXTS = st.text(st.sampled_from("abAB éÉ\u0301ßİ09٣,.-'’_\n\t\u00a0¶©漢字かไทย\u200b한🎉Ⱥ\u1100"), max_size=60)


def test_every_character_is_normalized_as_pythons_lower_and_split():
    texts = [f" A{character}\t{character} \nb " for character in CHARACTERS]
    for start in range(0, len(texts), 1 << 16):
        chunk = texts[start : start + (1 << 16)]
        assert normalized_texts(chunk) == [" ".join("".join(map(lower, text)).split()) for text in chunk]


def test_no_normalized_character_takes_more_than_twice_its_bytes():
    assert max(len(lower(c).encode()) / len(c.encode()) for c in CHARACTERS) <= 2


def test_equal_but_for_case_white_space_and_composition_is_an_exact_duplicate():
    same = ["The  Café\n was\tOPEN ", "the café was open", "\u2003THE CAFE\u0301 was open\u00a0"]
    other = ["the café was open.", "thecafé was open", "the cafe was open", ""]
    hashes = [tuple(pair) for pair in exact_hashes(Texts(composed([*same, *other]))).tolist()]
    assert len(set(hashes[:3])) == 1
    assert len(set(hashes)) == 1 + len(other)


def test_every_character_is_folded_into_words_as_python_folds_it():
    options = MinHashOptions(ngram=1, bands=1, rows=1)
    texts = [f"a{character}b 1{character}5" for character in CHARACTERS]
    counts = np.concatenate(
        [signatures(Texts(texts[start : start + 65536]), options).ngrams for start in range(0, len(texts), 65536)]
    )
    assert counts.tolist() == [len(words(text)) for text in texts]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_band_hashes_are_those_of_plain_python(text):
    options = MinHashOptions(ngram=2, bands=3, rows=2)
    made = signatures(Texts([text]), options)
    assert made.ngrams.tolist() == [max(0, len(words(text)) - 1)]
    if made.ngrams[0]:
        assert made.band_hashes[0].tolist() == naive_band_hashes(text, options)


def test_a_long_document_has_the_minima_of_all_its_ngrams():
    generator = random.Random(1)
    text = " ".join("".join(generator.choices("abcdefgh", k=4)) for _ in range(3000))  # more than one block of shingles
    assert signatures(Texts([text]), MinHashOptions()).band_hashes[0].tolist() == naive_band_hashes(
        text, MinHashOptions()
    )


def test_a_document_does_not_depend_on_its_neighbours():
    texts = ["one two three four five six", "too short", "", "a b c d e f g h", "one two three four five six"]
    together = signatures(Texts(texts), MinHashOptions())
    for index, text in enumerate(texts):
        alone = signatures(Texts([text]), MinHashOptions())
        assert (alone.band_hashes == together.band_hashes[index]).all()
        assert (alone.sketches == together.sketches[index]).all()


def test_fewer_words_than_an_ngram_give_no_signature():
    made = signatures(Texts(["one two three four", "one two three four five", ""]), MinHashOptions())
    assert made.ngrams.tolist() == [0, 1, 0]


def random_pair(generator: random.Random, similarity: float, size: int) -> tuple[str, str, float]:
    """Two texts of `size` distinct words each, and the Jaccard similarity of their sets."""
    common = round(size * 2 * similarity / (1 + similarity))

    def fresh(count: int) -> list[str]:
        return ["".join(generator.choices(string.ascii_lowercase, k=12)) for _ in range(count)]

    both = fresh(common)
    a, b = (both + fresh(size - common) for _ in range(2))
    generator.shuffle(b)
    return " ".join(a), " ".join(b), len(set(a) & set(b)) / len(set(a) | set(b))


@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (5, 4)])
def test_pairs_match_with_the_probability_that_the_bands_promise(similarity, bands, rows):
    options = MinHashOptions(1, bands, rows)
    generator = random.Random(f"{similarity} {bands}")
    pairs = [random_pair(generator, similarity, 60) for _ in range(1500)]
    made = signatures(Texts([text for a, b, _ in pairs for text in (a, b)]), options)
    matched = int((made.band_hashes[0::2] == made.band_hashes[1::2]).any(axis=1).sum())
    probabilities = [1 - (1 - jaccard**rows) ** bands for _, _, jaccard in pairs]
    deviation = math.sqrt(sum(p * (1 - p) for p in probabilities))
    assert abs(matched - sum(probabilities)) <= 4 * deviation + 1
    assert options.probability(pairs[0][2]) == pytest.approx(probabilities[0])


def test_the_estimated_similarity_has_its_stated_error():
    options, generator, errors = MinHashOptions(1, 14, 8), random.Random(3), []
    for similarity in (0.5, 0.8):
        pairs = [random_pair(generator, similarity, 80) for _ in range(300)]
        sketches = signatures(Texts([text for a, b, _ in pairs for text in (a, b)]), options).sketches
        stated = math.sqrt((1 - similarity**2) / 112)
        errors = [
            (estimated_similarity(sketches[2 * i], sketches[2 * i + 1], 112) - pairs[i][2]) / stated
            for i in range(len(pairs))
        ]
        assert abs(np.mean(errors)) < 0.25
        assert 0.8 < np.std(errors) < 1.2
    assert estimated_similarity(sketches[0], sketches[0], 112) == 1


@pytest.mark.parametrize(
    ("threshold", "permutations", "bands", "rows"),
    [(0.5, 128, 25, 5), (0.8, 128, 9, 13), (0.9, 128, 5, 25)],  # what datasketch 1.6 chooses
)
def test_bands_for_a_threshold_are_those_of_datasketch(threshold, permutations, bands, rows):
    assert options_for(threshold, permutations, 5) == MinHashOptions(5, bands, rows)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.85])
def test_bands_for_a_threshold_err_least(threshold):
    def error(bands: int, rows: int) -> float:
        area = 0.0
        for step in range(400):
            similarity = (step + 0.5) / 400
            matched = 1 - (1 - similarity**rows) ** bands
            area += matched if similarity < threshold else 1 - matched
        return area / 400

    chosen = options_for(threshold, 40, 5)
    assert chosen.permutations <= 40
    errors = [error(bands, rows) for bands in range(1, 41) for rows in range(1, 40 // bands + 1)]
    assert error(chosen.bands, chosen.rows) <= min(errors) + 1e-3


def test_the_default_threshold_is_that_of_fineweb():
    assert MinHashOptions().threshold == pytest.approx((1 / 14) ** (1 / 8))
    assert MinHashOptions().permutations == 112
