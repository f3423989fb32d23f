"""A fast encoder gives the reference's ids, or is not used: on nasty texts, on random ones, and wrong doubles."""

import itertools
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import encoder_check, fast_encoders, tokenize
from data_prep.documents import ReadOptions
from data_prep.encoder_check import SampleCheck, first_difference, nasty_texts, prove
from data_prep.encoding import Encoded, Encoder, load_tokenizer_info, utf8
from data_prep.stream import Source
from data_prep.tokenize import TokenizeOptions, encode_source

KINDS = {"byte_level": "gigatoken", "bpe": "gigatoken", "unigram": "sentencepiece", "wordpiece": "tokie"}
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=120),
    st.text(st.sampled_from("ab \n"), max_size=200),
    st.lists(st.sampled_from([" ", "\n", "the", "[MASK]", "<|endoftext|>", "<0x41>", "##", "東", "é", "e\u0301"])).map(
        "".join
    ),
)


@pytest.fixture(scope="module")
def pairs(tokenizer_folders) -> dict[str, tuple]:
    return {
        kind: (fast_encoders.FAST_ENCODERS[name](tokenizer_folders[kind]), Encoder(tokenizer_folders[kind]))
        for kind, name in KINDS.items()
    }


def ids(encoder, texts: list[str]) -> list[list[int]]:
    encoded = encoder.encode_flat(texts, utf8(texts))
    assert encoded.lengths.sum() == len(encoded.ids)
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])] if texts else []


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_has_its_fast_encoder(tokenizer_folders, kind):
    assert fast_encoders.fast_encoder_for(tokenizer_folders[kind]) == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_texts_have_the_references_ids(pairs, kind):
    fast, reference = pairs[kind]
    texts = nasty_texts()
    assert ids(fast, texts) == [found.tolist() for found in reference.encode_batch(texts)]


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(texts=st.lists(TEXTS, max_size=4))
def test_any_texts_have_the_references_ids(pairs, kind, texts):
    fast, reference = pairs[kind]
    assert ids(fast, texts) == [found.tolist() for found in reference.encode_batch(texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_are_plain_text(pairs, tokenizer_folders, kind):
    special = load_tokenizer_info(tokenizer_folders[kind]).special
    numbers = {special.end_of_document, special.mask, special.padding, special.separator} - {None}
    found = ids(pairs[kind][0], ["<|endoftext|>", "a [MASK] b", "[PAD][SEP]<|endoftext|>"])
    assert all(found) and not numbers & {i for document in found for i in document}


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_of_words_have_the_references_ids(pairs, kind, tiny_texts):
    fast, reference = pairs[kind]
    texts = [" ".join(tiny_texts * 5), "short", "\n".join(tiny_texts * 4) + " é" * 40_000, "x" * 70_000]
    assert len(texts[0]) > 3 * 64_000
    assert ids(fast, texts) == [found.tolist() for found in reference.encode_batch(texts)]


@given(st.text(st.sampled_from(" ab\u2581é"), max_size=60), st.integers(4, 24))
def test_long_texts_are_cut_before_spaces_that_follow_something_else(text, limit):
    before = fast_encoders._MAX_PIECE_BYTES
    fast_encoders._MAX_PIECE_BYTES = limit
    try:
        pieces = fast_encoders._cut(text)
    finally:
        fast_encoders._MAX_PIECE_BYTES = before
    assert "".join(pieces) == text
    for left, right in itertools.pairwise(pieces):
        assert right.startswith(" ") and left[-1] not in " \u2581"


def test_documents_on_whose_characters_tokie_differs_are_left_to_the_reference(pairs, tokenizer_folders):
    texts = ["plain text", "a\x7fb", "an unassigned \u0378 one", "日本語 and é", "", "again \u0378"]
    bare, (guarded, reference) = fast_encoders.Tokie(tokenizer_folders["wordpiece"]), pairs["wordpiece"]
    expected = [found.tolist() for found in reference.encode_batch(texts)]
    differing = [ours != theirs for ours, theirs in zip(ids(bare, texts), expected, strict=True)]
    assert differing == [False, True, True, False, False, True]
    before = guarded.reference_documents
    assert ids(guarded, texts) == expected
    assert guarded.reference_documents - before == 3


def test_nasty_texts_hold_every_category_and_look_alikes():
    texts = nasty_texts(["<|mine|>"])
    found = {unicodedata.category(character) for text in texts for character in text}
    assert found == {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"}
    assert {"", "[MASK]", "<|endoftext|>", "<|mine|>"} <= set(texts)
    assert max(map(len, texts)) >= 5000


def test_a_lone_surrogate_is_a_value_error_naming_it():
    with pytest.raises(ValueError, match=r"text 1 of the batch holds the lone surrogate U\+D83D at character 2"):
        utf8(["fine", "ab\ud83d"])


def encoded(*documents: list[int]) -> Encoded:
    flat = np.array([i for document in documents for i in document], dtype=np.int32)
    return Encoded(flat, np.array([len(document) for document in documents], dtype=np.int64))


@pytest.mark.parametrize(
    ("found", "place"),
    [
        (encoded([1, 2], [], [3, 4, 5]), None),
        (encoded([1, 2], [], [3, 9, 5]), (2, 1)),
        (encoded([9, 2], [], [3, 4, 9]), (0, 0)),
        (encoded([1, 2], [], [3, 4, 5, 6]), (2, 3)),
        (encoded([1, 2], [], [3, 4]), (2, 2)),
        (encoded([1], [2], [3, 4, 5]), (0, 1)),
        (encoded([1, 2], [7], [3, 4, 5]), (1, 0)),
        (encoded([9, 2], [7], [3, 4, 5]), (0, 0)),
    ],
)
def test_the_first_difference_is_found(found, place):
    assert first_difference(encoded([1, 2], [], [3, 4, 5]), found) == place


class Double:
    """A fast encoder that is right but for documents that hold `rare`, whose last id it changes."""

    name, version = "gigatoken", "0.0-double"
    rare = "CAN'T"

    def __init__(self, folder: Path) -> None:
        self._reference = Encoder(folder)

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        found = self._reference.encode_flat(texts, encoded)
        changed = found.ids.copy()
        for text, end in zip(texts, np.cumsum(found.lengths), strict=True):
            if self.rare in text:
                changed[end - 1] ^= 1
        return Encoded(changed, found.lengths)


class Unloadable:
    def __init__(self, folder: Path) -> None:
        raise RuntimeError("a kind of tokenizer\nthat it does not know")


class Never(Double):
    rare = "the rarest of words"


def test_the_proof_finds_a_wrong_id_in_the_corpus_and_in_nasty_texts(tokenizer_folders, monkeypatch):
    monkeypatch.setitem(fast_encoders.FAST_ENCODERS, "gigatoken", Never)
    assert prove("gigatoken", tokenizer_folders["bpe"], "never", ["a text", "another"]).fault == ""
    fault = prove("gigatoken", tokenizer_folders["bpe"], "never", ["a text", "with the rarest of words"]).fault
    assert fault.startswith("gigatoken 0.0-double gives another id at token") and "'with the rarest" in fault
    monkeypatch.setitem(fast_encoders.FAST_ENCODERS, "gigatoken", Double)
    assert "gives another id at token" in prove("gigatoken", tokenizer_folders["bpe"], "double", []).fault
    monkeypatch.setitem(fast_encoders.FAST_ENCODERS, "gigatoken", Unloadable)
    fault = prove("gigatoken", tokenizer_folders["bpe"], "unloadable", []).fault
    assert fault == "gigatoken does not take it (a kind of tokenizer that it does not know)"


def test_the_sample_is_the_same_however_the_documents_are_batched(tokenizer_folders):
    reference = Encoder(tokenizer_folders["bpe"])
    texts = [f"document {number}" for number in range(200)]

    def drawn(sizes: list[int]) -> list[int]:
        """The documents that are drawn: each is wrong, and a check is asked of one after the other."""
        check = SampleCheck(reference, part_number=3, one_in=8)
        found, start = [], 0
        for size in sizes:
            batch = texts[start : start + size]
            right = reference.encode_flat(batch, utf8(batch))
            before = check.checked.documents
            assert check(batch, utf8(batch), right) is None
            found.append(check.checked.documents - before)
            start += size
        return found

    one_by_one = drawn([1] * 200)
    assert 10 < sum(one_by_one) < 50
    assert drawn([50, 30, 120]) == [sum(one_by_one[:50]), sum(one_by_one[50:80]), sum(one_by_one[80:])]


class InProcess:
    """A `Work` whose parts are done here, so that doubles take part."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.scratch = output_dir, output_dir / "scratch"
        self.scratch.mkdir(parents=True)
        self.phases = []

    def run(self, function, parts, *, part_inputs, part_bytes, description):
        assert len(parts) == len(part_inputs) == len(part_bytes)
        self.phases.append(description)
        return [function(*part, lambda documents, size: None) for part in parts]


def encode(folder: Path, corpus: Path, tokenizer: Path, options: TokenizeOptions):
    fast_encoders.load_encoder.cache_clear()
    work = InProcess(folder)
    info = load_tokenizer_info(tokenizer)
    source = Source((f"{corpus}/*.jsonl",), ReadOptions(part_bytes=20_000))
    shards = encode_source(work, source, info, np.dtype("<u2"), options)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return work, shards, files


@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize("case", ["in the sample", "in the beginning", "unloadable"])
def test_one_differing_id_makes_all_be_encoded_by_the_reference(
    tiny_corpus, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, capfd, case, shuffle_seed
):
    """The rare document is one of the last; the shards are those of the reference, byte for byte."""
    options = TokenizeOptions(encoder="reference", shuffle_seed=shuffle_seed)
    expected = encode(tmp_path / "reference", tiny_corpus, tiny_tokenizer, options)[2]
    double = {"in the sample": Never, "in the beginning": Never, "unloadable": Unloadable}[case]
    monkeypatch.setattr(Never, "rare", "The end \u2028")  # in the last document
    monkeypatch.setitem(fast_encoders.FAST_ENCODERS, "gigatoken", double)
    monkeypatch.setattr(encoder_check, "CHECKED_DOCUMENT_IN", 1)
    if case == "in the sample":
        monkeypatch.setattr(tokenize, "_CHECKED_BYTES", 1000)
    capfd.readouterr()
    options = TokenizeOptions(shuffle_seed=shuffle_seed)
    work, shards, found = encode(tmp_path / "double", tiny_corpus, tiny_tokenizer, options)
    assert work.phases[:2] == ["tokenize", "tokenize with the reference"]
    assert found == expected and len(found) >= 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith(": all is encoded again with the reference")
    if case == "in the sample":
        tokens = Encoder(tiny_tokenizer).encode_batch([tiny_texts[-1]])[0].size
        assert f"gives another id at token {tokens - 1} of" in lines[0]
        assert "documents-01.jsonl" in lines[0]
    assert shards.encoder["name"] == "reference" and shards.encoder["differed"] == "gigatoken"


def test_the_manifest_says_what_encoded_and_what_was_checked(tiny_corpus, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_check, "CHECKED_DOCUMENT_IN", 4)
    work, shards, found = encode(tmp_path / "fast", tiny_corpus, tiny_tokenizer, TokenizeOptions())
    expected = encode(tmp_path / "slow", tiny_corpus, tiny_tokenizer, TokenizeOptions(encoder="reference"))
    assert found == expected[2] and work.phases == ["tokenize"]
    record = shards.encoder
    assert (record["name"], record["documents_left_to_the_reference"]) == ("gigatoken", 0)
    assert record["checked_before"]["documents"] == 240 + len(nasty_texts(Encoder(tiny_tokenizer).special_tokens()))
    assert 30 <= record["checked_during"]["documents"] <= 90 and record["checked_during"]["tokens"] > 1000
    assert expected[1].encoder["name"] == "reference"
    assert expected[1].encoder["checked_during"]["documents"] == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores a thread has")
def test_tokie_has_one_core_while_it_encodes_and_the_process_all_of_them_after(tokenizer_folders):
    encoder = fast_encoders.Tokie(tokenizer_folders["wordpiece"])
    allowed, seen = os.sched_getaffinity(0), []

    class Watched:
        def encode_batch_flat(self, texts, **flags):
            seen.append(os.sched_getaffinity(0))
            return original.encode_batch_flat(texts, **flags)

    original, encoder._tokenizer = encoder._tokenizer, Watched()
    assert len(encoder.encode_flat(["some text"], [b"some text"]).ids) > 1
    assert [len(cores) for cores in seen] == [1] and seen[0] <= allowed
    assert os.sched_getaffinity(0) == allowed
