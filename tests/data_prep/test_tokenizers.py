"""Tokenizers: trained, converted, and the same ids from sentencepiece, our Encoder and transformers."""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import encoding, train_tokenizer
from data_prep.documents import ReadOptions, list_parts
from data_prep.errors import UserError
from data_prep.fast_encoders import fast_encoder_for, load_encoder
from data_prep.manifest import read_manifest, verify_files

VOCAB_SIZE = 1200
FURTHER = ["<|fim_prefix|>", "<a>", "[SUFFIX]", "<fim,middle>"]
LITERALS = "[MASK] [UNK][PAD] x[CLS]y <|endoftext|> <|endoftext|><0x41><0x0A> <unk> <s>"
NASTY = [
    "",
    " ",
    "\n",
    "  leading, trailing   ",
    "tabs\tand\t\tmore\t",
    "a\r\nb\rc\n\n\n\n d\x0b\x0c\x85\u2028\u2029e",
    "\x00",
    "a\x00b\x01\x1f\x7f\x9f",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 flags 🇫🇷🇯🇵",
    "combining e\u0301\u0323 é Å \u0301alone \u1e9b\u0323 ﬁ ① ½ ²",
    "日本語の文章、中文字符 한국어 ไทย",
    "עברית وعربي \u202eabc\u202c \u200f\u200e",
    "1234567890 3.14159e-10 ٣٤٥ 12",
    "a" * 5000,
    "ab" * 3000,
    "aba" * 1000 + "abaab" * 500,
    " " * 4097,
    " \n" * 1500,
    "#" * 777 + " " + "=" * 333 + "-" * 1001,
    "0" * 500,
    "x" + "\u3000\u00a0\u200b\ufeff\u00ad" * 3,
    "\ufffd\ufffe\uffff\U0010ffff\ue000\u2585",
    LITERALS,
    "def f(self):\n        return [MASK]\n",
    "THE the The tHE",
]
# Short alphabets make overlapping merges and runs; text() makes everything else.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=200),
    st.text(st.sampled_from("ab \n"), max_size=200),
    st.lists(st.sampled_from([" ", "\n", "self", "the", "[MASK]", "<0x41>", "##", "==", "東", "é"]), max_size=60).map(
        "".join
    ),
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(*options: object) -> None:
    parser = argparse.ArgumentParser()
    train_tokenizer.add_arguments(parser)
    train_tokenizer.main(parser.parse_args([str(option) for option in options]))


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    names = ("argparse", "ast", "calendar", "decimal", "difflib", "inspect", "pathlib", "typing", "uuid")
    library = Path(sysconfig.get_paths()["stdlib"])
    source = [
        (library / f"{name}.py").read_text(encoding="utf-8") for name in names if (library / f"{name}.py").is_file()
    ]
    runs = ["aa ab ba aba bab abab aaa aaaa aaaaa aaaaaaaaaa abaab baaba abaababaab " * 20]
    other = [
        "日本語の文章。中文字符。日本語 עברית وعربي مرحبا été naïve Ünïcödé 👍 👍🏽 ½ price\n" * 20,
        LITERALS * 30,
    ]
    return [*source, *runs, *other]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_documents(tmp_path_factory.mktemp("corpus") / "documents.jsonl", texts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in train_tokenizer.TYPES:
        run("--input", corpus, "--output_dir", root / kind, "--type", kind, "--vocab_size", VOCAB_SIZE)
    return {kind: root / kind for kind in train_tokenizer.TYPES}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, encoding.Encoder]:
    return {kind: encoding.Encoder(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, sentencepiece.SentencePieceProcessor]:
    return {
        kind: sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / train_tokenizer.MODEL_FILE))
        for kind in ("bpe", "unigram")
    }


def ids_of(encoder: encoding.Encoder, text: str) -> list[int]:
    return encoder.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_ids_equal_sentencepiece_on_nasty_strings(encoders, references, kind, text):
    assert ids_of(encoders[kind], text) == references[kind].encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_equal_sentencepiece_on_any_text(encoders, references, kind):
    @QUICK
    @given(TEXTS)
    def check(text: str) -> None:
        ids = ids_of(encoders[kind], text)
        assert ids == references[kind].encode(text)
        assert encoders[kind].decode(ids) == text

    check()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_equal_sentencepiece_on_real_documents(encoders, references, texts, kind):
    texts = [text[:60_000] for text in texts]
    assert [ids.tolist() for ids in encoders[kind].encode_batch(texts)] == [references[kind].encode(t) for t in texts]


def test_bpe_ids_equal_sentencepiece_where_merges_overlap():
    alphabet = [" ".join(a + b + a for a in ("a", "ab", "aab") for b in ("a", "b", "ba", "aba", "bb")) + "\n"]
    model = train_tokenizer.train_sentencepiece(alphabet * 30, "bpe", 400)
    tokenizer = train_tokenizer.convert_sentencepiece(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = [format(n, "b").translate({48: "a", 49: "b"}) for n in range(1 << 12)]
    assert [e.ids for e in tokenizer.encode_batch(words)] == reference.encode(words)
    runs = ["ab"[n % 2] * n + "aab" * (n % 7) for n in range(600)]
    assert [e.ids for e in tokenizer.encode_batch(runs)] == reference.encode(runs)


def test_unigram_ids_of_a_long_document_are_those_of_its_words(encoders, references, texts):
    document = "".join(texts) * 4
    assert len(document) > 1_000_000
    cut = re.findall(r" *[^ ]+| +", document)
    expected = [i for ids in references["unigram"].encode(cut) for i in ids]
    assert ids_of(encoders["unigram"], document) == expected


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_decoding_gives_the_text_back(encoders, kind, text):
    assert encoders[kind].decode(ids_of(encoders[kind], text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_u2581_is_the_one_character_that_decodes_to_another(encoders, kind):
    assert encoders[kind].decode(ids_of(encoders[kind], "a\u2581b")) == "a b"


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_text_never_yields_a_special_token(encoders, kind):
    for text in NASTY:
        special = set(ids_of(encoders[kind], text)) & set(range(6))
        assert special <= ({0} if kind == "wordpiece" else set())
    assert not set(ids_of(encoders[kind], LITERALS)) & set(range(6))


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_transformers_gives_the_same_ids_and_texts(folders, encoders, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in NASTY:
        ids = ids_of(encoders[kind], text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == encoders[kind].decode(ids)
    info = encoding.load_tokenizer_info(folders[kind])
    assert len(tokenizer) == info.vocab_size == VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (info.special.end_of_document,) * 2
    assert tokenizer.pad_token_id == info.special.padding
    assert tokenizer.cls_token_id == info.special.classification
    assert tokenizer.sep_token_id == info.special.separator
    assert tokenizer.mask_token_id == info.special.mask
    assert tokenizer.unk_token_id == info.special.unknown


def test_transformers_keeps_the_ids_through_save_pretrained(folders, encoders, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, folder in folders.items():
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / kind)
        again = encoding.Encoder(tmp_path / kind)
        assert encoding.load_tokenizer_info(tmp_path / kind).special.end_of_document == 5
        for text in NASTY:
            assert ids_of(again, text) == ids_of(encoders[kind], text)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        assert saved(LITERALS)["input_ids"] == ids_of(encoders[kind], LITERALS)


def test_wordpiece_lowercases_and_splits_as_bert(encoders):
    assert ids_of(encoders["wordpiece"], "THE Été") == ids_of(encoders["wordpiece"], "the ete")
    assert encoders["wordpiece"].decode(ids_of(encoders["wordpiece"], "the self")) == "the self"


def test_wordpiece_keeps_case_when_asked(texts):
    cased = train_tokenizer.train_wordpiece(texts[:3], 1000, lowercase=False)
    assert cased.encode("THE").ids != cased.encode("the").ids


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_special_tokens_come_first_and_the_vocabulary_is_exact(folders, kind):
    vocabulary = json.loads((folders[kind] / "tokenizer.json").read_text())["model"]["vocab"]
    first = [token for token, _ in vocabulary][:6] if kind == "unigram" else sorted(vocabulary, key=vocabulary.get)[:6]
    assert first == ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
    assert len(vocabulary) == VOCAB_SIZE


@pytest.fixture(scope="module")
def further_folders(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """As `folders`, with special tokens of the user's that the text is full of."""
    root = tmp_path_factory.mktemp("further")
    text = write_documents(root / "d.jsonl", [*texts[:2], *[" ".join(FURTHER) + "".join(FURTHER)] * 200])
    for kind in train_tokenizer.TYPES:
        options = ("--type", kind, "--vocab_size", VOCAB_SIZE, "--special_tokens", *FURTHER)
        run("--input", text, "--output_dir", root / kind, *options)
    return {kind: root / kind for kind in train_tokenizer.TYPES}


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_further_special_tokens_follow_the_six_and_text_never_yields_them(further_folders, kind):
    folder = further_folders[kind]
    raw = json.loads((folder / "tokenizer.json").read_text())
    expected = [*train_tokenizer.SPECIAL_TOKENS.values(), *FURTHER]
    assert [(token["id"], token["content"]) for token in raw["added_tokens"]] == list(enumerate(expected))
    assert all(token["special"] for token in raw["added_tokens"])
    assert read_manifest(folder).content["special_tokens"] == {token: i for i, token in enumerate(expected)}
    assert encoding.load_tokenizer_info(folder).vocab_size == len(raw["model"]["vocab"]) == VOCAB_SIZE
    encoder = encoding.Encoder(folder)
    fast = load_encoder(fast_encoder_for(folder), folder, "")
    for text in [*FURTHER, "".join(FURTHER), " ".join(FURTHER), f"x{FURTHER[0]}y", *NASTY]:
        ids = ids_of(encoder, text)
        special = set(ids) & set(range(len(expected)))
        assert special <= ({0} if kind == "wordpiece" else set())
        assert fast.encode_flat([text], [text.encode()]).ids.tolist() == ids
        assert kind == "wordpiece" or encoder.decode(ids) == text
    assert not set(ids_of(encoder, "".join(FURTHER))) & set(range(len(expected)))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_knows_the_further_special_tokens_as_controls(further_folders, kind):
    model = further_folders[kind] / train_tokenizer.MODEL_FILE
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert reference.id_to_piece(list(range(10)))[6:] == FURTHER
    assert all(map(reference.is_control, range(6, 10)))
    encoder = encoding.Encoder(further_folders[kind])
    for text in [*FURTHER, "".join(FURTHER), f"x {FURTHER[0]}y", *NASTY]:
        assert ids_of(encoder, text) == reference.encode(text)


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_transformers_knows_the_further_special_tokens_after_saving_too(further_folders, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(further_folders[kind])
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.convert_tokens_to_ids(FURTHER) == [6, 7, 8, 9]
        assert len(loaded) == VOCAB_SIZE
        assert set(FURTHER) < set(loaded.all_special_tokens)
        assert loaded.decode([6, 7, 8, 9], skip_special_tokens=True) == ""
        assert not set(loaded("".join(FURTHER))["input_ids"]) & set(range(10))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<a>", "<b>", "<a>"], "'<a>' is given twice"),
        (["<|endoftext|>"], r"'<\|endoftext\|>': every tokenizer has it already"),
        *[
            ([token], "expected printable ASCII in angle or square")
            for token in ("", " ", "the", "##a", "<é>", "<a b>")
        ],
        *[([token], "expected printable ASCII in angle or square") for token in ("<|>", "[0]", "<a", "<0x41>")],
    ],
)
def test_special_tokens_that_text_could_yield_are_refused(tmp_path, tokens, message):
    path = write_documents(tmp_path / "d.jsonl", ["text"])
    options = ["--input", path, "--output_dir", tmp_path / "t", "--type", "bpe", "--vocab_size", 380]
    with pytest.raises(UserError, match=message) as raised:
        run(*options, "--special_tokens", *tokens)
    assert "\n" not in str(raised.value)


def test_further_special_tokens_are_part_of_the_job_and_their_lack_is_none(tmp_path, capsys):
    path = write_documents(tmp_path / "d.jsonl", ["the quick brown fox jumps over the lazy dog. " * 5] * 20)
    options = ["--input", path, "--output_dir", tmp_path / "t", "--type", "bpe", "--vocab_size", 380]
    run(*options)
    assert "special_tokens" not in read_manifest(tmp_path / "t").job, "so older manifests are those of equal jobs"
    with pytest.raises(UserError, match="--overwrite"):
        run(*options, "--special_tokens", "<a>", "<b>")
    run(*options, "--special_tokens", "<a>", "<b>", "--overwrite")
    assert "up to date" not in capsys.readouterr().out
    run(*options, "--special_tokens", "<a>", "<b>")
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        run(*options, "--special_tokens", "<b>", "<a>")


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_manifest_describes_every_file(folders, kind):
    folder = folders[kind]
    manifest = read_manifest(folder, "tokenizer")
    assert verify_files(folder, manifest, lambda _: None) == []
    assert {*manifest.files, "manifest.json"} == set(os.listdir(folder))
    info = encoding.load_tokenizer_info(folder)
    assert manifest.content["fingerprint"] == info.fingerprint == encoding.tokenizer_fingerprint(folder)
    assert manifest.content["vocab_size"] == VOCAB_SIZE


@pytest.mark.parametrize("kind", train_tokenizer.TYPES)
def test_training_again_in_another_process_gives_the_same_bytes(folders, corpus, tmp_path, kind):
    root = Path(train_tokenizer.__file__).parents[1]
    code = (
        "import argparse; from data_prep import train_tokenizer as t; p = argparse.ArgumentParser();"
        " t.add_arguments(p); t.main(p.parse_args())"
    )
    options = [
        "--input",
        corpus,
        "--output_dir",
        tmp_path / "t",
        "--type",
        kind,
        "--vocab_size",
        str(VOCAB_SIZE),
    ]
    subprocess.run([sys.executable, "-c", code, *options], cwd=root, check=True, capture_output=True)
    for name in read_manifest(tmp_path / "t").files:
        assert (tmp_path / "t" / name).read_bytes() == (folders[kind] / name).read_bytes()


def test_sample_is_deterministic_bounded_and_spread_over_the_input(tmp_path):
    for n in range(4):
        write_documents(tmp_path / f"{n}.jsonl", [f"{n} {i} é " + "x" * 1000 for i in range(1500)])
    parts = list_parts([str(tmp_path / "*.jsonl")], ReadOptions(part_bytes=1 << 20))
    first, again, other = (
        train_tokenizer.sample_texts(parts, ReadOptions(), max_bytes=3_000_000, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {text[0] for text in first} == set("0123")
    size = sum(len(text.encode()) for text in first)
    assert 2_900_000 <= size <= 3_000_000
    everything = train_tokenizer.sample_texts(parts, ReadOptions(), max_bytes=10**9, seed=1)
    assert len(everything) == 6000


def test_sample_of_one_huge_document_stops_at_the_bound(tmp_path):
    path = write_documents(tmp_path / "one.jsonl", ["é" * 100_000])
    sample = train_tokenizer.sample_texts(
        list_parts([str(path)], ReadOptions(part_bytes=1 << 20)), ReadOptions(), max_bytes=1001, seed=0
    )
    assert sample == ["é" * 500]


@pytest.mark.parametrize("text", ["x" * 20_001, "word " * 5000, "line\n\n" * 5000, "a b\n" * 5000, "  \n" * 4000, ""])
def test_chunks_lose_nothing_and_are_short(text):
    chunks = list(train_tokenizer._chunks(text))
    assert "".join(chunks) == text
    assert all(len(chunk) <= 4000 for chunk in chunks)


def test_held_out_texts_are_not_trained_on():
    texts = [f"{n} " + "x" * 1000 for n in range(20_000)]
    training, held_out = train_tokenizer.split_held_out(texts)
    assert sum(map(len, held_out)) <= 200_000
    assert {text.split()[0] for text in held_out}.isdisjoint(text.split()[0] for text in training)
    assert len(training) + len(held_out) == len(texts)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 100_000, r"--vocab_size 100000: this text supports at most \d+ for a bpe"),
        ("unigram", 100_000, r"at most \d+ for a unigram"),
        ("wordpiece", 100_000, r"at most \d+ for a wordpiece"),
        ("bpe", 50, r"--vocab_size 50: this text supports at least 35\d for a bpe"),
        ("unigram", 300, r"at least 35\d for a unigram"),
        ("wordpiece", 50, r"at least 1\d\d for a wordpiece"),
    ],
)
def test_impossible_vocabulary_is_one_line_with_the_bound(tmp_path, kind, size, message):
    path = write_documents(tmp_path / "d.jsonl", ["the quick brown fox jumps over the lazy dog. " * 5] * 20)
    with pytest.raises(UserError, match=message) as raised:
        run("--input", path, "--output_dir", tmp_path / "t", "--type", kind, "--vocab_size", size)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "t").exists()
    if kind != "unigram":  # its pruning does not always reach the bound that sentencepiece names
        bound = str(raised.value).split(" most " if " most " in message else " least ")[1].split()[0]
        run("--input", path, "--output_dir", tmp_path / "t", "--type", kind, "--vocab_size", bound)


@pytest.mark.parametrize("content", ["", "\n", '{"text": ""}\n', '{"text": " \\n"}\n'])
def test_empty_corpus_is_a_user_error(tmp_path, content):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(UserError, match="no text"):
        run(
            "--input",
            tmp_path / "d.jsonl",
            "--output_dir",
            tmp_path / "t",
            "--type",
            "bpe",
            "--vocab_size",
            500,
        )


def test_characters_that_sentencepiece_reserves_do_not_stop_training(tmp_path):
    path = write_documents(tmp_path / "d.jsonl", ["the quick \u2585 fox\x00\ttab\u2581 " * 40])
    for kind, size in (("bpe", 370), ("unigram", 360), ("wordpiece", 150)):
        run("--input", path, "--output_dir", tmp_path / kind, "--type", kind, "--vocab_size", size)


def test_text_around_characters_that_sentencepiece_reserves_is_not_skipped():
    model = train_tokenizer.train_sentencepiece(["zebra\u2585 zebra\x00 \tzebra"] * 100, "bpe", 370)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).encode("zebra", out_type=str) == ["zebra"]


def test_finished_job_is_kept_and_another_one_refused_until_overwrite(tmp_path, capsys):
    path = write_documents(tmp_path / "d.jsonl", ["the quick brown fox jumps over the lazy dog. " * 5] * 20)
    options = ["--input", path, "--output_dir", tmp_path / "t", "--type", "bpe"]
    run(*options, "--vocab_size", 380)
    before = (tmp_path / "t" / "manifest.json").stat().st_ino
    run(*options, "--vocab_size", 380)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        run(*options, "--vocab_size", 385)
    assert (tmp_path / "t" / "manifest.json").stat().st_ino == before
    run(*options, "--vocab_size", 385, "--overwrite")
    assert read_manifest(tmp_path / "t").content["vocab_size"] == 385
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl", "t"]


def test_overwrite_never_removes_what_is_not_a_tokenizer(tmp_path):
    path = write_documents(tmp_path / "d.jsonl", ["text"])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    options = ["--input", path, "--output_dir", tmp_path / "home", "--type", "bpe", "--vocab_size", 380]
    with pytest.raises(UserError, match="finished tokenizers only"):
        run(*options, "--overwrite")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_encoder_names_a_lone_surrogate(encoders):
    for encoder in encoders.values():
        with pytest.raises(ValueError, match=r"text 1 .* lone surrogate U\+D83D at character 2"):
            encoder.encode_batch(["fine", "ab\ud83d"])


def test_encoder_gives_int32_arrays_and_no_special_tokens(encoders):
    for encoder in encoders.values():
        batch = encoder.encode_batch(["a", "", "the self"])
        assert [ids.dtype for ids in batch] == [np.dtype(np.int32)] * 3
        assert len(batch[1]) == 0
    assert encoders["bpe"].encode_batch([]) == []


def test_encoder_ignores_truncation_padding_and_the_post_processor(folders, encoders, tmp_path):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox [MASK]"
    assert ids_of(encoding.Encoder(tmp_path), text) == ids_of(encoders["bpe"], text)


def test_end_of_document_is_the_separator_where_there_is_no_eos(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["wordpiece"] / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="no end-of-document token"):
        encoding.load_tokenizer_info(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": {"content": "[SEP]", "lstrip": false}}')
    special = encoding.load_tokenizer_info(tmp_path).special
    assert special == encoding.SpecialTokens(3, None, None, 3, None, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"eos_token '</s>' is not in tokenizer.json"):
        encoding.load_tokenizer_info(tmp_path)


def test_tokenizer_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        encoding.load_tokenizer_info(tmp_path / "absent")
    with pytest.raises(UserError, match=r"save_pretrained\("):
        encoding.Encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        encoding.Encoder(tmp_path)


def test_fingerprint_follows_the_tokenizer_files_alone(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folders["bpe"] / name).read_bytes())
    assert encoding.tokenizer_fingerprint(tmp_path) == encoding.tokenizer_fingerprint(folders["bpe"])
    (tmp_path / "README.md").write_text("mine")
    assert encoding.tokenizer_fingerprint(tmp_path) == encoding.tokenizer_fingerprint(folders["bpe"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert encoding.tokenizer_fingerprint(tmp_path) != encoding.tokenizer_fingerprint(folders["bpe"])


def test_importing_encoding_imports_neither_torch_nor_transformers():
    unwanted = "{'torch', 'transformers', 'sentencepiece'}"
    code = f"import sys, data_prep.encoding; sys.exit(bool({unwanted} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(encoding.__file__).parents[1], check=True)


def test_encoder_is_single_threaded_unless_the_environment_says_otherwise(folders, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    encoding.Encoder(folders["bpe"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    encoding.Encoder(folders["bpe"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
