"""Documents that share n-grams with evaluation data are found, in every kind of evaluation file."""

import gzip
import json
import random

import pytest

from data_prep.decontamination import DecontaminateOptions
from data_prep.documents import Batch, Part
from data_prep.errors import UserError

SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom"  # 18 words


def batch_of(texts: list[str]) -> Batch:
    part = Part("corpus.jsonl", 0, 0, 0)
    return Batch(part, texts, [{} for _ in texts], list(range(1, len(texts) + 1)), 0)


def kept(options: DecontaminateOptions, texts: list[str]) -> list[int]:
    step = options.make(0)
    return [line - 1 for line in step(batch_of(texts)).lines]


@pytest.fixture
def evaluation(tmp_path):
    def write(content: str, name: str = "evaluation.txt") -> str:
        path = tmp_path / name
        raw = content.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(path)

    return write


def test_documents_with_a_common_ngram_are_those_that_naive_sets_find(evaluation):
    generator = random.Random(11)
    vocabulary = ["red", "Blue", "green", "7", "over", "Höhe"]

    def text(words: int) -> str:
        return "".join(generator.choice(vocabulary) + generator.choice((" ", ", ", "\n", " - ")) for _ in range(words))

    def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
        words = [word.lower().replace("ö", "o") for word in text.replace(",", " ").replace("-", " ").split()]
        grams = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
        return {gram for gram in grams if 2 * sum(word != "7" for word in gram) >= size}

    lines = [text(generator.randint(1, 30)).replace("\n", " ") for _ in range(40)]
    documents = [text(generator.randint(1, 60)) for _ in range(400)]
    for size in (4, 5, 6):
        looked_for = set().union(*(ngrams(line, size) for line in lines))
        options = DecontaminateOptions.of([evaluation("\n".join(lines))], ngram=size)
        assert options.describe()["ngrams"] == len(looked_for)
        expected = [i for i, document in enumerate(documents) if not ngrams(document, size) & looked_for]
        assert kept(options, documents) == expected
        assert 5 < len(expected) < 395


def test_what_was_removed_is_counted_and_shown_with_the_ngram(evaluation):
    options = DecontaminateOptions.of([evaluation(SENTENCE + "\n")])
    step = options.make(0)
    document = "Prologue – über alles. it was THE BEST of times it was the\nworst of times... It (was the) end"
    assert step(batch_of(["nothing here", document])).texts == ["nothing here"]
    summary = step.summary()
    assert summary["documents"] == 2
    assert summary["removed"] == {"contaminated": 1}
    assert summary["removed_bytes"] == len(document.encode())
    [sample] = summary["samples"]["contaminated"]
    assert sample["place"] == "corpus.jsonl:2"
    assert sample["text"] == document
    assert sample["ngram"] == "it was THE BEST of times it was the worst of times... It"


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("squad.json", json.dumps({"data": [{"paragraphs": [{"context": SENTENCE, "id": 3}]}]}), ""),
        ("tasks.jsonl", json.dumps({"a": 1}) + "\n" + json.dumps({"question": SENTENCE}) + "\n", ""),
        ("tasks.jsonl", json.dumps({"question": SENTENCE, "text": "no"}) + "\n", "question"),
        ("glue.tsv", f"label\tsentence\n1\t{SENTENCE}\n", ""),
        ("glue.csv", f'label,sentence\n1,"{SENTENCE}"\n', "sentence"),
        ("lines.txt.gz", f"a line\n{SENTENCE}\n", ""),
    ],
)
def test_evaluation_files_of_every_kind_are_read(evaluation, name, content, field):
    options = DecontaminateOptions.of([evaluation(content, name)], field=field)
    assert options.describe()["ngrams"] == 6
    assert kept(options, [f"He wrote: {SENTENCE}.", "He wrote nothing."]) == [1]


def test_ngrams_do_not_cross_texts(evaluation):
    words = SENTENCE.split()
    options = DecontaminateOptions.of(
        [evaluation(" ".join(words[:10]) + "\n" + " ".join(words[10:]) + "\t" + "more " * 13)]
    )
    assert options.describe() == {"texts": 3, "short_texts": 2, "ngrams": 1}
    assert kept(options, [SENTENCE]) == [0]


def test_tables_of_numbers_contaminate_nothing(evaluation):
    table = " ".join(map(str, range(40)))
    options = DecontaminateOptions.of([evaluation(f"{table} {SENTENCE}\n")])
    assert kept(options, [table, "the sum is " + table, SENTENCE]) == [0, 1]


def test_a_document_stays_until_it_has_the_number_of_matches(evaluation):
    path = evaluation(SENTENCE)
    words = SENTENCE.split()
    texts = [" ".join(words[:13]), " ".join(words[:14]), " ".join([*words[:13], "X", *words[2:15]])]
    assert kept(DecontaminateOptions.of([path]), texts) == []
    assert kept(DecontaminateOptions.of([path], matches=2), texts) == [0]
    assert kept(DecontaminateOptions.of([path], matches=3), texts) == [0, 1, 2]


def test_characters_are_words_in_scripts_without_spaces(evaluation):
    question = "世界上最高的山峰是哪一座山峰呢"
    options = DecontaminateOptions.of([evaluation(question)])
    assert kept(options, [f"请问，{question}？", "世界上最高的山峰是珠穆朗玛峰"]) == [1]


def test_a_change_of_the_evaluation_files_changes_the_options(evaluation):
    before = DecontaminateOptions.of([evaluation(SENTENCE)])
    after = DecontaminateOptions.of([evaluation(SENTENCE + " and more")])
    assert repr(before) != repr(after)
    assert after.describe()["ngrams"] == before.describe()["ngrams"] + 2


@pytest.mark.parametrize(
    ("content", "name", "field", "message"),
    [
        ("one short line\n", "a.txt", "", "none of the 1 texts has 13 words"),
        ('{"a": 1}\n{"b": tru\n', "a.json", "", "neither JSON nor JSON lines"),
        ("PAR1", "a.parquet", "", "--decontaminate_field"),
    ],
)
def test_evaluation_files_that_say_nothing_are_refused(evaluation, content, name, field, message):
    with pytest.raises(UserError, match=message):
        DecontaminateOptions.of([evaluation(content, name)], field=field)


def test_a_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        DecontaminateOptions.of([f"{tmp_path}/*.tsv"])
