"""The built-in corpus: English prose from this machine's own docstrings, the same bytes every time."""

import collections
import json
import re

import pytest

from data_prep.builtin_corpus import _deduplicated, builtin_corpus, docstrings, is_english_prose
from data_prep.manifest import read_manifest, verify_files
from data_prep.parts import Execution

MAX_BYTES = 300_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builtin") / "documents"
    builtin_corpus(folder, max_bytes=MAX_BYTES, execution=Execution(workers=2))
    return folder


@pytest.fixture(scope="module")
def documents(corpus):
    return [json.loads(line) for path in sorted(corpus.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def test_one_worker_writes_the_bytes_of_two(corpus, tmp_path):
    builtin_corpus(tmp_path / "again", max_bytes=MAX_BYTES, execution=Execution(workers=1))
    names = sorted(path.name for path in corpus.iterdir())
    assert names == [*(f"documents-0{i}.jsonl" for i in range(4)), "manifest.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (corpus / name).read_bytes()


def test_the_size_is_what_was_asked_for(corpus, documents):
    size = sum(len(document["text"].encode()) for document in documents)
    largest = max(len(document["text"].encode()) for document in documents)
    assert MAX_BYTES <= size < MAX_BYTES + largest
    manifest = read_manifest(corpus, "documents")
    assert manifest.content["documents"] == len(documents) and manifest.content["text_bytes"] == size
    assert verify_files(corpus, manifest, lambda _: None) == []


def test_no_document_or_paragraph_of_weight_comes_twice(documents):
    assert len({document["id"] for document in documents}) == len(documents) > 30
    counts = collections.Counter(
        paragraph
        for document in documents
        for paragraph in {" ".join(text.split()).lower() for text in document["text"].split("\n\n")}
        if len(paragraph) > 200
    )
    # Docstrings may share a paragraph; whole documents and most paragraphs do not come twice.
    assert len(counts) > 100
    assert sum(count - 1 for count in counts.values()) < 0.02 * len(counts)


def test_a_docstring_that_an_earlier_file_had_is_left_out(tmp_path):
    first, second, third = ("The first. " * 20, "The second. " * 20, "The third. " * 20)
    records = [tmp_path / "0", tmp_path / "1"]
    records[0].write_text(json.dumps(["a.py", [first, second]]) + "\n")
    records[1].write_text(json.dumps(["b.py", [second.upper().replace(" ", "\n "), third]]) + "\n")
    assert _deduplicated(records, 1 << 20) == (
        [{"id": "a.py", "text": f"{first}\n\n{second}"}, {"id": "b.py", "text": third}],
        1,
    )


def test_documents_are_english_prose(documents):
    words = collections.Counter(
        word.lower() for document in documents for word in re.findall(r"[A-Za-z]+", document["text"])
    )
    # "the" alone is about 6 % of English, of docstrings 5 %; in code it is none.
    assert words["the"] > 0.03 * words.total()
    for document in documents:
        assert len(document["text"]) >= 200
        assert sum(map(str.isascii, document["text"])) > 0.9 * len(document["text"])
        assert document["id"].endswith(".py")


def test_docstrings_are_cleaned_and_in_order_and_code_is_never_run():
    source = (
        '"""Module.\n\n    Indented.\n"""\nraise SystemExit\ndef f():\n    """Function."""\nclass A:\n    x = "no"\n'
    )
    assert list(docstrings(source)) == ["Module.\n\nIndented.", "Function."]


def test_prose_is_told_from_tables_and_other_languages():
    assert is_english_prose("Returns the number of tokens in the file, or None if it is empty.")
    assert not is_english_prose("x y z alpha beta gamma delta epsilon zeta eta theta iota")
    assert not is_english_prose("Gibt die Zahl der Wörter zurück, die noch nicht gelesen worden sind")
    assert not is_english_prose("Short one.")


def test_a_second_run_makes_nothing_and_another_seed_is_refused(corpus, data_prep):
    flags = ["builtin_corpus", "--output_dir", corpus, "--max_megabytes", "0.3"]
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert data_prep(*flags).stdout == f"{corpus}: up to date\n"
    assert "give --overwrite" in data_prep(*flags, "--seed", "1").error
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before
