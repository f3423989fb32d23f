"""Duplicates found out of core: against brute force over the whole corpus, however it is cut up."""

import json
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import duplicates
from data_prep.documents import ReadOptions
from data_prep.duplicates import EXACT, NEAR, DuplicateOptions, find_duplicates, partition_count, write_signatures
from data_prep.minhash import MinHashOptions, Texts, kernel, pointer, signatures
from data_prep.stream import DocumentStream, Source


class InlineWork:
    """A job at work in this process; its scratch files go to `scratch`."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch, self.results = scratch, {}

    def run(self, function: Callable[..., Any], parts: Any, *, description: str, **_: Any) -> list[dict[str, Any]]:
        self.results[description] = [function(*part, lambda documents, size: None) for part in parts]
        return self.results[description]


def document(generator: random.Random, words: int) -> list[str]:
    return ["".join(generator.choices("abcdefghij", k=6)) for _ in range(words)]


def edited(generator: random.Random, words: list[str], changes: int) -> list[str]:
    result = list(words)
    for _ in range(changes):
        result[generator.randrange(len(result))] = "".join(generator.choices("abcdefghij", k=6))
    return result


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """300 documents: about a third each are alone, exact duplicates but for case and space, and edited ones."""
    generator = random.Random(7)
    found: list[str] = []
    for _ in range(60):
        words = document(generator, generator.randint(3, 150))
        family = [" ".join(words)]
        for _ in range(generator.choice((0, 0, 1, 3, 12))):
            if generator.random() < 0.5:
                family.append("  ".join(words).upper() + generator.choice(("", "\n")))
            else:
                words = edited(generator, words, generator.choice((1, 1, 2, 8)))  # of the last one: chains
                family.append(" ".join(words))
        found += family
    generator.shuffle(found)
    return found


@pytest.fixture
def corpus(tmp_path, texts) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", texts)


def write_corpus(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": f"d{i}", "text": text, "n": i}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def source_of(path: Path, part_bytes: int = 10**9) -> Source:
    return Source((str(path),), ReadOptions(part_bytes=part_bytes, fields=True))


def left(source: Source) -> tuple[list[int], list[dict[str, Any]]]:
    """(the "n" of the documents that a source yields, the summaries of its parts)."""
    numbers, summaries = [], []
    for number, part in enumerate(source.parts()):
        stream = DocumentStream(source, part, number, lambda documents, size: None)
        numbers += [fields["n"] for batch in stream for fields in batch.fields]
        summaries.append(stream.summary())
    return numbers, summaries


def clusters_of(count: int, same: Callable[[int, int], bool]) -> list[int]:
    """The first member of each document's connected component, by comparing every pair."""
    first = list(range(count))
    for b in range(count):
        for a in range(b):
            if first[a] != first[b] and same(a, b):
                low, high = sorted((first[a], first[b]))
                first = [low if of == high else of for of in first]
    return first


def expected(texts: list[str], options: DuplicateOptions) -> list[int]:
    """The documents that stay, by brute force."""
    plain = [" ".join(unicodedata.normalize("NFC", text).lower().split()) for text in texts]
    made = signatures(Texts(texts), options.minhash)

    def same(a: int, b: int) -> bool:
        exact = EXACT in options.methods and plain[a] == plain[b]
        near = NEAR in options.methods and made.ngrams[a] and made.ngrams[b]
        return exact or bool(near and (made.band_hashes[a] == made.band_hashes[b]).any())

    return [i for i, first in enumerate(clusters_of(len(texts), same)) if i == first]


@pytest.mark.parametrize("methods", [(EXACT,), (NEAR,), (EXACT, NEAR)])
@pytest.mark.parametrize("part_bytes", [10**9, 20_000, 3_000])
def test_the_first_of_each_cluster_stays_as_brute_force_has_it(corpus, texts, tmp_path, methods, part_bytes):
    options = DuplicateOptions(methods)
    found = find_duplicates(InlineWork(tmp_path / "scratch"), source_of(corpus, part_bytes), options)
    stays, summaries = left(found.source)
    assert stays == expected(texts, options)
    assert len(texts) > len(stays) > 20
    removed = sum(sum(summary["steps"]["deduplicate"]["removed"].values()) for summary in summaries)
    assert removed == len(texts) - len(stays) == sum(found.content["removed"].values())


def test_ranges_of_keys_do_not_change_what_stays(corpus, texts, tmp_path, monkeypatch):
    options = DuplicateOptions()
    whole = find_duplicates(InlineWork(tmp_path / "whole"), source_of(corpus, 30_000), options)
    monkeypatch.setattr(duplicates, "PARTITION_BYTES", 200 * 64)
    work = InlineWork(tmp_path / "cut")
    cut = find_duplicates(work, source_of(corpus, 30_000), options)
    assert len(work.results["matches"]) > 5
    assert left(cut.source)[0] == left(whole.source)[0]
    assert cut.content == whole.content


def test_several_runs_of_one_part_are_numbered_through(tmp_path, monkeypatch):
    generator = random.Random(3)
    originals = [" ".join(document(generator, 30_000)) for _ in range(12)]  # 200 kB each: several batches
    texts = [*originals, *originals[::-1]]
    monkeypatch.setattr(duplicates, "RUN_BYTES", 1)
    work = InlineWork(tmp_path / "scratch")
    found = find_duplicates(work, source_of(write_corpus(tmp_path / "c.jsonl", texts)), DuplicateOptions())
    assert len(duplicates._BlockReader(tmp_path / "scratch/signatures-000000.bin").header["sets"]) > 3
    assert left(found.source)[0] == list(range(12))
    assert found.content["removed"] == {EXACT: 12, NEAR: 0}


def test_chunks_of_documents_do_not_change_what_stays(corpus, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    for part_bytes in (10**9, 20_000):
        work = InlineWork(tmp_path / f"{part_bytes}")
        found = find_duplicates(work, source_of(corpus, part_bytes), DuplicateOptions())
        stays, summaries = left(found.source)
        assert stays == expected(texts, DuplicateOptions())
        assert sum(found.content["removed"].values()) == len(texts) - len(stays)
        assert sum(summary["steps"]["deduplicate"]["documents"] for summary in summaries) == len(texts)


def test_spilled_documents_are_those_of_a_second_reading(corpus, tmp_path):
    options = DuplicateOptions()
    again = find_duplicates(InlineWork(tmp_path / "again"), source_of(corpus, 20_000), options)
    spilled = find_duplicates(InlineWork(tmp_path / "spilled"), source_of(corpus, 20_000), options, spill=True)
    assert spilled.content == again.content
    os.rename(corpus, corpus.with_suffix(".gone"))  # only the scratch files are read
    numbers, summaries = left(spilled.source)
    os.rename(corpus.with_suffix(".gone"), corpus)
    assert (numbers, [summary["steps"] for summary in summaries]) == (
        left(again.source)[0],
        [summary["steps"] for summary in left(again.source)[1]],
    )


def test_a_part_without_documents_is_no_obstacle(tmp_path):
    line = json.dumps({"text": "word " * 40, "n": 0})
    path = tmp_path / "corpus.jsonl"
    path.write_text(line + "\n" + line + "\n")
    source = source_of(path, 40)  # lines of 230 bytes: most parts hold none
    for spill in (False, True):
        found = find_duplicates(InlineWork(tmp_path / f"{spill}"), source, DuplicateOptions(), spill=spill)
        assert len(found.source.parts()) > 5
        assert left(found.source)[0] == [0]


def test_a_chain_of_neighbours_is_one_cluster(tmp_path):
    generator = random.Random(5)
    words = document(generator, 120)
    chain = [words]
    for place in range(0, 120, 12):
        chain.append([*chain[-1][:place], "changed", *chain[-1][place + 1 :]])
    texts = [" ".join(words) for words in chain]
    options = DuplicateOptions((NEAR,))
    made = signatures(Texts(texts), options.minhash).band_hashes
    assert all((made[i] == made[i + 1]).any() for i in range(len(texts) - 1))
    assert not (made[0] == made[-1]).any()
    work = InlineWork(tmp_path / "scratch")
    found = find_duplicates(work, source_of(write_corpus(tmp_path / "c.jsonl", texts)), options)
    assert left(found.source)[0] == [0]
    assert found.content["clusters"] == 1
    assert found.content["largest_cluster"] == len(texts) == 11
    assert found.content["cluster_sizes"] == {"9-16": 1}


def test_samples_name_the_place_of_the_document_kept_and_the_similarity(tmp_path):
    generator = random.Random(9)
    words = document(generator, 200)
    near = edited(generator, words, 1)
    texts = ["alone " * 3, " ".join(words), "x" * 500, " ".join(words).upper(), " ".join(near)]
    path = write_corpus(tmp_path / "corpus.jsonl", texts)
    for spill in (False, True):
        work = InlineWork(tmp_path / f"scratch{spill}")
        found = find_duplicates(work, source_of(path, 1500), DuplicateOptions(), spill=spill)
        summaries = [summary["steps"]["deduplicate"] for summary in left(found.source)[1]]
        assert len(summaries) > 2
        [exact] = [sample for summary in summaries for sample in summary["samples"].get(EXACT, [])]
        [similar] = [sample for summary in summaries for sample in summary["samples"].get(NEAR, [])]
        assert (exact["place"], exact["kept"]) == (f"{path}:4", f"{path}:2")
        assert (similar["place"], similar["kept"]) == (f"{path}:5", f"{path}:2")
        assert texts[4].startswith(similar["text"])
        assert 0.75 < similar["similarity"] <= 1


def test_memory_of_a_range_of_keys_is_bounded_whatever_the_corpus():
    for records in (0, 1, 10**5, 10**8, 14 * 10**10):
        count = partition_count(records)
        assert records / count * 64 <= duplicates.PARTITION_BYTES
        assert count == 1 or records / (count - 1) * 64 > duplicates.PARTITION_BYTES


def test_memory_of_a_run_is_bounded_whatever_the_bands():
    for bands, rows in ((1, 1), (14, 8), (1000, 4)):
        options = DuplicateOptions(minhash=MinHashOptions(5, bands, rows))
        assert options.run_documents * bands * 32 <= duplicates.RUN_BYTES


def test_a_text_that_is_everywhere_stands_once_in_a_run(tmp_path):
    texts = ["the same words in every one of the documents"] * 5000
    source = source_of(write_corpus(tmp_path / "corpus.jsonl", texts))
    for methods, records in (((EXACT, NEAR), {EXACT: 1, NEAR: 14}), ((NEAR,), {NEAR: 14})):
        [part] = source.parts()
        result = write_signatures(
            source, part, 0, DuplicateOptions(methods), str(tmp_path), False, lambda documents, size: None
        )
        assert result["records"] == records


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(0, 60))
def test_union_find_gives_connected_components_and_which_were_exact(pairs, exact_count):
    parents, sizes = np.zeros(30, np.uint64), np.zeros(30, np.uint32)
    for chosen, exact in ((pairs[:exact_count], 1), (pairs[exact_count:], 0)):
        array = np.array(chosen, np.uint64).reshape(-1, 2)
        assert kernel().unite(pointer(parents), 30, pointer(array), len(array), exact) == 0
    numbers, roots, marks = np.empty(30, np.uint64), np.empty(30, np.uint64), np.empty(30, np.uint8)
    found = kernel().list_duplicates(
        pointer(parents), 0, 30, pointer(numbers), pointer(roots), pointer(marks), pointer(sizes)
    )
    all_pairs = {frozenset(pair) for pair in pairs}
    exact_pairs = {frozenset(pair) for pair in pairs[:exact_count]}
    first = clusters_of(30, lambda a, b: frozenset((a, b)) in all_pairs)
    first_exact = clusters_of(30, lambda a, b: frozenset((a, b)) in exact_pairs)
    assert numbers[:found].tolist() == [i for i in range(30) if first[i] != i]
    assert roots[:found].tolist() == [first[i] for i in range(30) if first[i] != i]
    assert marks[:found].tolist() == [first_exact[i] != i for i in range(30) if first[i] != i]
    assert sizes.tolist() == [first.count(i) - 1 if first[i] == i else 0 for i in range(30)]


def test_a_pair_beyond_the_documents_is_refused():
    parents, pair = np.zeros(3, np.uint64), np.array([[0, 3]], np.uint64)
    assert kernel().unite(pointer(parents), 3, pointer(pair), 1, 0) == -1
    assert not parents.any()
