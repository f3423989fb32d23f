"""Shared by every test: a small corpus, a tokenizer and token shards, made once a session by data_prep itself."""

import json
import random
import signal
from pathlib import Path

import pytest

from data_prep import __main__ as data_prep_main
from data_prep.tokenize import tokenize

# A shell has SIGINT ignored in its background jobs, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_DOCUMENTS = 240
TINY_VOCABULARY = 768
TINY_PART_BYTES = 20_000

SUBJECTS = ("the function", "a reader", "every worker", "this tensor", "the old harbour", "one shard", "the teacher")
VERBS = ("returns", "keeps", "counts", "follows", "repeats", "explains", "carries", "measures")
OBJECTS = ("the number of tokens", "a list of names", "its own weight", "the first letter", "no more than an hour")
ENDINGS = ("in order", "when the file ends", "without a copy", "before the rain", "for every step", "as it should")


def english_like(generator: random.Random, sentences: int) -> str:
    """Grammatical nonsense: words repeat as words do, so a tokenizer and a model find something to learn."""
    return " ".join(
        f"{generator.choice(SUBJECTS).capitalize()} {generator.choice(VERBS)} {generator.choice(OBJECTS)}"
        f" {generator.choice(ENDINGS)}{generator.choice(('', f', {generator.randrange(1000)} times'))}."
        for _ in range(sentences)
    )


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """The documents of `tiny_corpus`, in its order; some have newlines, accents and emoji."""
    generator = random.Random(1234)
    texts = [english_like(generator, generator.randint(1, 12)) for _ in range(TINY_DOCUMENTS)]
    texts[3] += "\n\nA second paragraph, naïve but précis: 日本語 👍🏽.\n"
    texts[-1] += "\r\n\tThe end \u2028 of it all."
    return texts


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A folder of two JSONL files with `tiny_texts`."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    half = len(tiny_texts) // 2
    for name, texts in (("documents-00.jsonl", tiny_texts[:half]), ("documents-01.jsonl", tiny_texts[half:])):
        lines = (json.dumps({"text": text, "id": index}, ensure_ascii=False) for index, text in enumerate(texts))
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A bpe tokenizer of 768 pieces, trained on `tiny_corpus`."""
    folder = tmp_path_factory.mktemp("tiny_tokenizer") / "tokenizer"
    data_prep_main.run_stage(
        "train_tokenizer",
        f"--input {tiny_corpus}/*.jsonl --output_dir {folder} --type bpe --vocab_size {TINY_VOCABULARY}".split(),
    )
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Path:
    """Shards of `tiny_corpus`, several of them. Shared: a test that changes something works on a copy."""
    folder = tmp_path_factory.mktemp("tiny_shards") / "shards"
    tokenize([f"{tiny_corpus}/*.jsonl"], tiny_tokenizer, folder, part_bytes=TINY_PART_BYTES, workers=1)
    return folder
