"""Sentence starts: the rule on hand-worked texts and against a naive one, and the tokens that they fall on."""

import itertools
import json
import re
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep import fast_encoders
from data_prep.encoding import Encoded, Encoder, utf8
from data_prep.errors import UserError
from data_prep.sentences import (
    PieceSizes,
    SentenceFinder,
    Sentences,
    SentencesWriter,
    Text,
    sentence_starts,
    with_ends,
)

KINDS = ("byte_level", "bpe", "unigram", "wordpiece")
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = [
    "The",
    "cat",
    "x",
    "é",
    "ß",
    "É",
    "東",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    ".",
    "!",
    "?",
    "…",
    "。",
    "！",
    "’",
]
PIECES += [
    "”",
    '"',
    ")",
    "Dr",
    "e.g",
    "J",
    "No",
    "Fig",
    "12",
    "3",
    ".5",
    "\t",
    "\u3000",
    "\u00a0",
    "؟",
    "I",
    "etc",
    ",",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(st.sampled_from("aA. \n!1é。"), max_size=60),
)


def split(text: str) -> list[str]:
    """The sentences that the kernel finds, each with the white space before it."""
    first, starts = sentence_starts(Text.of([text.encode()]))
    assert first.tolist() == [0, len(starts)]
    raw = text.encode()
    return [part.decode() for part in np_split(raw, starts.tolist())]


def np_split(raw: bytes, starts: list[int]) -> list[bytes]:
    return [raw[a:b] for a, b in zip([0, *starts], [*starts, len(raw)], strict=True)]


HAND_WORKED = {
    "One. Two! Three? Four": ["One.", " Two!", " Three?", " Four"],
    "No end": ["No end"],
    "One.  \n Two": ["One.", "  \n Two"],
    "He paid 3.14 dollars. It was v1.2.3 of a.b.c": ["He paid 3.14 dollars.", " It was v1.2.3 of a.b.c"],
    'He said "Go." Then (he left.) And': ['He said "Go."', " Then (he left.)", " And"],
    "« Oui. » Non. ‘Yes.’ No": ["« Oui.", " » Non.", " ‘Yes.’", " No"],
    "What?! Really... Yes": ["What?!", " Really...", " Yes"],
    "it ended. but went on… and on": ["it ended. but went on… and on"],
    "Dr. Smith and Mrs. Jones, e.g. John. Then": ["Dr. Smith and Mrs. Jones, e.g. John.", " Then"],
    "By J. Smith. See Fig. 3 and No. 5. No. He": ["By J. Smith.", " See Fig. 3 and No. 5.", " No.", " He"],
    "It was I. Then": ["It was I.", " Then"],
    "Title\n\nText\nmore\n \t\nEnd": ["Title", "\n\nText\nmore", "\n \t\nEnd"],
    "1. First\n2. Second\n 3. Third. Fourth": ["1. First\n2. Second\n 3. Third.", " Fourth"],
    "In 1999. Then": ["In 1999.", " Then"],
    "\n\n  \n\nStart.\n\n": ["\n\n  \n\nStart.\n\n"],
    "。。": ["。。"],
    "これは文です。次の文！「はい。」最後": ["これは文です。", "次の文！", "「はい。」", "最後"],
    "Ça va. Été. été. Ωμέγα. ωμέγα": ["Ça va.", " Été. été.", " Ωμέγα. ωμέγα"],
    "هل؟ نعم۔ لا": ["هل؟", " نعم۔", " لا"],
    "": [""],
    " ": [" "],
    ".": ["."],
    "a.\u3000Be.\u00a0C": ["a.", "\u3000Be.", "\u00a0C"],
}


@pytest.mark.parametrize("text", HAND_WORKED)
def test_hand_worked_texts_are_cut_as_the_rule_says(text):
    assert split(text) == HAND_WORKED[text]


SPACE = r"\s"
STRONG = "。！．？｡"
STOPS = f".!?…؟۔।{STRONG}"
CLOSERS = "\"')]}»’”›〉》」』】）｣"
NAMES = "adm capt cf cmdr col dr eg e.g gen gov hon i.e ie lt maj messrs mlle mme mr mrs ms mt pres prof rep rev sen"
NAMES += " sgt st vs viz approx dept univ"
NUMBERS = "art ch eq eqs fig figs no nos p para pp sec sect tab vol vols ver v"
NUMBERS += " jan feb mar apr jun jul aug sep sept oct nov dec"
BREAK = re.compile(rf"(?P<stops>[{re.escape(STOPS)}]+)[{re.escape(CLOSERS)}]*|(?P<blank>\n\s*\n)")


def naive_starts(text: str) -> list[int]:
    """The rule, written with regular expressions over characters; positions in characters."""
    starts, begin, at = [], len(text) - len(text.lstrip()), len(text) - len(text.lstrip())
    while found := BREAK.search(text, at):
        rest = text[found.end() :].lstrip()
        if found["blank"]:
            cut = found.start()
            rest = text[found.start() :].lstrip()
        else:
            cut = found.end()
            spaced = text[found.end() : found.end() + 1].isspace() or set(found["stops"]) & set(STRONG)
            lower = rest[:1].isalpha() and (rest[:1].islower() or not rest[:1].isupper()) and cased(rest[:1])
            if not spaced or lower or (found["stops"] == "." and abbreviates(text[begin : found.start()], rest)):
                at = found.end()
                continue
        if not rest:
            break
        starts.append(cut)
        begin = at = len(text) - len(rest)
    return starts


def cased(character: str) -> bool:
    """In the blocks of Latin, Greek, Cyrillic and Armenian."""
    code = ord(character)
    if code < 0x80:
        return character.islower()
    return code < 0x590 or 0x1E00 <= code < 0x2000


def abbreviates(before: str, rest: str) -> bool:
    digit = rest[:1] in set("0123456789")
    if re.search(r"(^|\n)[ \t]*[0-9]{1,4}$", before):
        return True
    word = re.search(r"(?:^|(?<=[^A-Za-z.]))[A-Za-z.]{1,8}$", before) or re.search(r"[A-Za-z.]{8}$", before)
    if not word:
        return False
    previous = before[: word.start()][-1:]
    inner = word[0].lstrip(".")
    if inner != word[0]:
        previous = "."
    if previous and (ord(previous) >= 0x80 or previous in "0123456789_"):
        return False
    if re.fullmatch("[A-HJ-Z]", inner):
        return True
    return inner.lower() in NAMES.split() or (digit and inner.lower() in NUMBERS.split())


@QUICK
@example("xDr. A")
@example("9.\n2. A")
@example(". .. A")
@given(TEXTS)
def test_any_text_is_cut_as_a_naive_rule_cuts_it(text):
    # The kernel's tables are of one version of Unicode, Python's of another.
    if any(unicodedata.category(c) == "Cn" or c.isspace() != bool(re.match(SPACE, c)) for c in text):
        return
    starts = naive_starts(text)
    expected = [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    assert split(text) == expected


@QUICK
@given(st.lists(TEXTS, max_size=5))
def test_documents_of_a_batch_are_apart(texts):
    first, starts = sentence_starts(Text.of(utf8(texts)))
    expected = [sentence_starts(Text.of([text.encode()]))[1].tolist() for text in texts]
    assert [starts[a:b].tolist() for a, b in itertools.pairwise(first)] == expected


def expected_tokens(reference: Encoder, text: str, kind: str = "") -> list[int]:
    """The first token that begins at or after each start, by the reference's offsets in characters.

    Of unigram the offsets of characters without a piece are those of their whole run, so there the pieces are added up.
    """
    raw = text.encode()
    begins = reference.token_starts(text).tolist()
    starts = sentence_starts(Text.of([raw]))[1].tolist()
    if kind == "unigram":
        pieces = [reference.decode([i]) for i in reference.encode_batch([text])[0]]
        sizes = [1 if "\ufffd" in piece else len(piece.encode()) for piece in pieces]
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
    else:
        starts = [len(raw[:start].decode()) for start in starts]
    tokens = [next((i for i, begin in enumerate(begins) if begin >= start), len(begins)) for start in starts]
    return sorted({token for token in tokens if 0 < token < len(begins)})


@pytest.fixture(scope="module")
def finders(tokenizer_folders) -> dict[str, tuple]:
    references = {kind: Encoder(tokenizer_folders[kind]) for kind in KINDS}
    return {kind: (SentenceFinder(tokenizer_folders[kind], references[kind]), references[kind]) for kind in KINDS}


def found_tokens(finder: SentenceFinder, reference: Encoder, texts: list[str]) -> list[list[int]]:
    raw = utf8(texts)
    first, starts = finder(texts, Text.of(raw), reference.encode_flat(texts, raw))
    return [starts[a:b].tolist() for a, b in itertools.pairwise(first)]


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_sentences_start_at_the_tokens_that_begin_there(finders, kind, texts):
    finder, reference = finders[kind]
    assert found_tokens(finder, reference, texts) == [expected_tokens(reference, text, kind) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_needs_no_offsets_of_the_reference(finders, tiny_texts, kind):
    finder, reference = finders[kind]
    texts = [*tiny_texts, "Naïve café. Ünïcödé! Straße? 日本語。 Emoji 👍🏽. Unknown ☃ words. Literal [MASK]. Done"]
    before = finder.slow_documents
    found = found_tokens(finder, reference, texts)
    assert finder.slow_documents == before
    assert found == [expected_tokens(reference, text, kind) for text in texts]
    assert sum(map(len, found)) > 1000


def test_characters_that_berts_normalizer_drops_or_takes_apart_are_counted(finders):
    finder, reference = finders["wordpiece"]
    texts = [
        "한국어. 문장. The 끝 end. Really",
        "One e\u0301\u0323. Two",
        "\ufeffOne\u200b. T\xadwo\x00. \x0cThree\ufffd.",
    ]
    before = finder.slow_documents
    assert found_tokens(finder, reference, texts) == [expected_tokens(reference, text) for text in texts]
    assert finder.slow_documents == before


def test_a_document_that_does_not_add_up_is_given_to_the_reference(finders):
    """BERT's normalizer drops private-use characters, which the kernel does not know."""
    finder, reference = finders["wordpiece"]
    texts = ["One. Two", "x\ue000y. Private. Use", "Plain. Again"]
    before = finder.slow_documents
    assert found_tokens(finder, reference, texts) == [expected_tokens(reference, text) for text in texts]
    assert finder.slow_documents == before + 1


def test_a_token_over_the_boundary_belongs_to_the_sentence_before(tmp_path):
    """Ids that stand for "A", ".\\n\\n" and "B": the second begins before the blank line."""
    sizes = PieceSizes("bytes", np.array([1, 3], dtype=np.int32))
    finder = SentenceFinder.__new__(SentenceFinder)
    finder._pieces, finder.slow_documents = sizes, 0
    text = "A.\n\nB"
    encoded = Encoded(np.array([0, 1, 0], dtype=np.int32), np.array([3], dtype=np.int64))
    first, starts = finder([text], Text.of([text.encode()]), encoded)
    assert (first.tolist(), starts.tolist(), finder.slow_documents) == ([0, 1], [2], 0)


def test_a_prefixed_space_shifts_the_starts(tokenizer_folders, train_byte_level, tmp_path, tiny_texts):
    folder = train_byte_level(tmp_path / "t", tiny_texts, add_prefix_space=True)
    reference = Encoder(folder)
    finder = SentenceFinder(folder, reference)
    assert PieceSizes.of(folder).prefix and not PieceSizes.of(tokenizer_folders["byte_level"]).prefix
    texts = ["One. Two! Three", " Spaced. Already? Yes", "Café. Yes"]
    starts = found_tokens(finder, reference, texts)
    pieces = [[reference.decode([i]) for i in ids] for ids in reference.encode_batch(texts)]
    joined = [
        ["".join(of[a:b]).strip() for a, b in zip([0, *cuts], [*cuts, len(of)], strict=True)]
        for of, cuts in zip(pieces, starts, strict=True)
    ]
    assert joined[0] == ["One.", "Two!", "Three"] and joined[1] == ["Spaced.", "Already?", "Yes"]
    assert finder.slow_documents == 0


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=6), max_size=6), st.integers(0, 65_535))
def test_every_document_gets_its_end(documents, end):
    flat = np.array([i for ids in documents for i in ids], dtype=np.int32)
    encoded = Encoded(flat, np.array([len(ids) for ids in documents], dtype=np.int64))
    expected = [i for ids in documents for i in [*ids, end]]
    for dtype in ("<u2", "<i4"):
        found = with_ends(encoded, end, np.dtype(dtype))
        assert found.dtype == np.dtype(dtype) and found.tolist() == expected


@pytest.mark.parametrize(("ids", "end"), [([65_536], 0), ([1], 70_000), ([-1], 0)])
def test_an_id_that_the_dtype_does_not_hold_is_refused(ids, end):
    encoded = Encoded(np.array(ids, dtype=np.int32), np.array([len(ids)], dtype=np.int64))
    with pytest.raises(ValueError, match="does not fit uint16"):
        with_ends(encoded, end, np.dtype("<u2"))


def write(prefix: Path, batches: list[list[list[int]]]) -> dict:
    writer = SentencesWriter(prefix)
    for batch in batches:
        first = np.cumsum([0, *map(len, batch)])
        writer.append_batch(first, np.array([i for starts in batch for i in starts], dtype=np.int32))
    return writer.write()


def test_the_file_follows_its_layout_and_reads_back(tmp_path):
    records = write(tmp_path / "000000", [[[3, 7], []], [[5]]])
    content = (tmp_path / "000000.sentences").read_bytes()
    assert content == struct.pack("<8sQQQ4q6i", b"SENTSTRT", 1, 3, 6, 0, 3, 4, 6, 0, 3, 7, 0, 0, 5)
    assert records["000000.sentences"].bytes == len(content)
    read = Sentences(tmp_path / "000000")
    assert [read.document(i).tolist() for i in range(read.documents)] == [[0, 3, 7], [0], [0, 5]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "is damaged or of another version"),
        (lambda raw: raw + b"\0", "is damaged or of another version"),
        (lambda raw: raw[:8] + b"\2" + raw[9:], "version 2"),
        (lambda raw: b"other" + raw[5:], "holds no sentence starts"),
        (lambda raw: b"", "is empty"),
        (None, "is missing: tokenize again"),
    ],
)
def test_a_damaged_file_is_one_error_naming_it(tmp_path, damage, message):
    write(tmp_path / "s", [[[1]]])
    path = tmp_path / "s.sentences"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=message) as error:
        Sentences(tmp_path / "s")
    assert str(path) in str(error.value)


def test_a_vocabulary_that_does_not_tell_leaves_all_to_the_reference(tokenizer_folders, tmp_path):
    raw = json.loads((tokenizer_folders["bpe"] / "tokenizer.json").read_bytes())
    raw["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert PieceSizes.of(tmp_path) is None
    reference = Encoder(tmp_path)
    finder = SentenceFinder(tmp_path, reference)
    texts = ["One. Two", "no boundary", "Three. Four! Five"]
    assert found_tokens(finder, reference, texts) == [expected_tokens(reference, text) for text in texts]
    assert finder.slow_documents == 2
    assert fast_encoders.fast_encoder_for(tmp_path) == "gigatoken"
