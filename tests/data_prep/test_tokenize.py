"""Tokenizing is exact: the same bytes however many workers, killed or not, and nothing half-made has a final name."""

import gzip
import itertools
import json
import os
import re
import shutil
import signal
import time
from dataclasses import fields

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import tokenize as tokenize_module
from data_prep.documents import Part, ReadOptions
from data_prep.durable import TEMPORARY_SUFFIX
from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.randomness import permute
from data_prep.sentences import Sentences
from data_prep.shards import Shard, ShardSet
from data_prep.shuffle import write_shuffled
from data_prep.tokenize import TokenizeOptions, tokenize

PART_BYTES = 20_000
SUFFIXES = (".bin", ".idx", ".sentences")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in SUFFIXES}


def all_ids(folder) -> list[list[int]]:
    shards = ShardSet.open(folder)
    mapped = [shards.shard(index) for index in range(len(shards.names))]
    return [shard.document(number).tolist() for shard in mapped for number in range(shard.documents)]


def flags(inputs, tokenizer, output_dir) -> list[object]:
    return ["tokenize", "--input", inputs, "--tokenizer", tokenizer, "--output_dir", output_dir]


def test_ids_are_autotokenizers_and_the_end_of_document(tiny_shards, tiny_tokenizer, tiny_texts):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_tokenizer)
    end = [reference.eos_token_id]
    assert all_ids(tiny_shards) == [reference(text, add_special_tokens=False)["input_ids"] + end for text in tiny_texts]


def test_two_workers_write_the_bytes_of_one(tiny_corpus, tiny_tokenizer, tiny_shards, tmp_path):
    tokenize([f"{tiny_corpus}/*.jsonl"], tiny_tokenizer, tmp_path / "s", part_bytes=PART_BYTES, workers=2)
    assert len(contents(tiny_shards)) == 18
    assert contents(tmp_path / "s") == contents(tiny_shards)
    assert (tmp_path / "s/manifest.json").read_bytes() == (tiny_shards / "manifest.json").read_bytes()
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {".bin", ".idx", ".sentences", ".json"}


def test_every_kind_of_file_gives_the_same_tokens(tiny_tokenizer, tiny_texts, tmp_path):
    texts = tiny_texts[:12]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    sources = tmp_path / "sources"
    for kind in ("jsonl", "gz", "zst", "parquet", "txt"):
        (sources / kind).mkdir(parents=True)
    (sources / "jsonl/a.jsonl").write_bytes(lines)
    (sources / "gz/a.jsonl.gz").write_bytes(gzip.compress(lines))
    (sources / "zst/a.jsonl.zst").write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sources / "parquet/a.parquet")
    for index, text in enumerate(texts):
        (sources / f"txt/{index:02d}.txt").write_bytes(text.encode())
    ids = {}
    for folder in sources.iterdir():
        tokenize([f"{folder}/*"], tiny_tokenizer, tmp_path / folder.name, workers=2)
        ids[folder.name] = all_ids(tmp_path / folder.name)
    assert len(ids["jsonl"]) == 12
    assert all(found == ids["jsonl"] for found in ids.values())


def test_blank_documents_and_parts_without_documents_leave_no_shard(tiny_tokenizer, tmp_path):
    """The long first line spans several parts; the blank ones fill another."""
    texts = ["word " * 100, *[" \n"] * 20, "the end"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize([f"{tmp_path}/a.jsonl"], tiny_tokenizer, tmp_path / "s", part_bytes=100, workers=2)
    shards = ShardSet.open(tmp_path / "s")
    assert len(all_ids(tmp_path / "s")) == 2 and sum(shards.documents) == 2
    assert 0 not in shards.documents
    assert set(contents(tmp_path / "s")) == {f"{name}{suffix}" for name in shards.names for suffix in SUFFIXES}
    manifest = json.loads((tmp_path / "s/manifest.json").read_bytes())
    assert set(manifest["files"]) - {"rejected.jsonl"} == set(contents(tmp_path / "s"))
    assert manifest["content"]["rejected_documents"] == {"empty": 20}


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def slow_job(tiny_corpus, tmp_path):
    """Input of some twenty parts, about 4 MB: long enough to be interrupted in the middle."""
    line = b"".join(path.read_bytes() for path in sorted(tiny_corpus.iterdir()))
    (tmp_path / "input.jsonl").write_bytes(line * 45)
    return tmp_path / "input.jsonl"


@pytest.mark.parametrize("shuffled", [[], ["--shuffle_seed", "3"]])
def test_a_killed_job_continues_to_the_same_bytes(
    slow_job, tiny_tokenizer, tmp_path, start_data_prep, data_prep, shuffled
):
    output = tmp_path / "shards"
    arguments = [*flags(slow_job, tiny_tokenizer, output), "--part_megabytes", "0.2", "--workers", "2", *shuffled]
    process = start_data_prep(*arguments)
    wait_for(lambda: len(list(output.glob(".parts/tokenize/0*.json"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (output / "manifest.json").exists()
    done = len(list(output.glob(".parts/tokenize/0*.json")))
    again = data_prep(*arguments)
    assert again.status == 0 and f"{done} of 21 parts were done before" in again.stdout
    assert {path.suffix for path in output.iterdir()} == {*SUFFIXES, ".json"}
    options = TokenizeOptions(shuffle_seed=3 if shuffled else None)
    tokenize([str(slow_job)], tiny_tokenizer, tmp_path / "whole", options=options, part_bytes=200_000, workers=2)
    assert contents(output) == contents(tmp_path / "whole")
    assert (output / "manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_what_is_up_to_date_is_not_made_again(tiny_corpus, tiny_tokenizer, tmp_path, data_prep):
    arguments = flags(f"{tiny_corpus}/*.jsonl", tiny_tokenizer, tmp_path / "s")
    assert data_prep(*arguments).status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    again = data_prep(*arguments)
    assert (again.status, again.stdout) == (0, f"{tmp_path / 's'}: up to date\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize("change", ["content", "a file with an old time stamp", "option"])
def test_another_input_or_option_is_refused_without_overwrite(tiny_tokenizer, tmp_path, data_prep, change):
    (tmp_path / "a.jsonl").write_text('{"text": "the first"}\n')
    arguments = flags(f"{tmp_path}/*.jsonl", tiny_tokenizer, tmp_path / "s")
    assert data_prep(*arguments).status == 0
    before = contents(tmp_path / "s")
    if change == "content":
        (tmp_path / "a.jsonl").write_text('{"text": "the other"}\n')  # of the same length
    elif change == "option":
        arguments += ["--part_megabytes", "0.00001"]
    else:
        (tmp_path / "b.jsonl").write_text('{"text": "the second"}\n')
        os.utime(tmp_path / "b.jsonl", (0, 0))
    refused = data_prep(*arguments)
    assert "its inputs have changed since; give --overwrite" in refused.error
    assert contents(tmp_path / "s") == before
    assert data_prep(*arguments, "--overwrite").status == 0
    if change != "option":
        assert contents(tmp_path / "s") != before


def test_overwrite_replaces_nothing_but_its_own_results(tiny_tokenizer, tmp_path, data_prep):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jsonl").write_text('{"text": "the first"}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    for folder, message in [
        ("mine", "holds the input"),
        ("other", "is not empty and holds nothing of ours"),
        ("tokenizer", "is not empty and holds a result of 'train_tokenizer'"),
        ("mine/a.jsonl", "is a file, expected a folder"),
    ]:
        for overwrite in ([], ["--overwrite"]):
            outcome = data_prep(*flags(tmp_path / "mine/a.jsonl", tiny_tokenizer, tmp_path / folder), *overwrite)
            assert message in outcome.error
    assert (tmp_path / "mine/a.jsonl").exists() and (tmp_path / "other/thesis.tex").exists()
    assert load_tokenizer_info(tmp_path / "tokenizer").fingerprint == load_tokenizer_info(tiny_tokenizer).fingerprint


GOOD = "".join(json.dumps({"text": f"document number {number}"}) + "\n" for number in range(60)).encode()
BAD_LINES = {
    "malformed JSON": b'{"text": oops}',
    "missing field": b'{"body": "x"}',
    "not a string": b'{"text": 1}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "lone surrogate": b'{"text": "\\udc80"}',
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_left_out_or_too_much(tiny_tokenizer, tmp_path, data_prep, case):
    (tmp_path / "a.jsonl").write_bytes(GOOD + BAD_LINES[case] + b"\n" + GOOD)
    arguments = flags(tmp_path / "a.jsonl", tiny_tokenizer, tmp_path / "s")
    refused = data_prep(*arguments)
    assert "1 of the 121 documents" in refused.error and "a.jsonl:61: " in refused.error
    assert not (tmp_path / "s/manifest.json").exists() and not list((tmp_path / "s").rglob(f"*{TEMPORARY_SUFFIX}"))
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        ShardSet.open(tmp_path / "s")
    assert data_prep(*arguments, "--max_bad_fraction", "0.01").status == 0
    (record,) = map(json.loads, (tmp_path / "s/rejected.jsonl").read_text().splitlines())
    assert (record["file"], record["line"]) == (str(tmp_path / "a.jsonl"), 61)
    manifest = json.loads((tmp_path / "s/manifest.json").read_bytes())
    assert manifest["content"]["documents"] == 120 and sum(manifest["content"]["rejected_documents"].values()) == 1
    (tmp_path / "good.jsonl").write_bytes(GOOD + GOOD)
    tokenize([str(tmp_path / "good.jsonl")], tiny_tokenizer, tmp_path / "good")
    assert all_ids(tmp_path / "s") == all_ids(tmp_path / "good")


@pytest.mark.parametrize("content", [b"", b'{"text": " "}\n\n'])
def test_input_without_text_is_one_error_and_leaves_nothing_that_looks_finished(
    tiny_tokenizer, tmp_path, data_prep, content
):
    (tmp_path / "a.jsonl").write_bytes(content)
    outcome = data_prep(*flags(tmp_path / "a.jsonl", tiny_tokenizer, tmp_path / "s"))
    assert "the input holds no text: " in outcome.error
    assert not (tmp_path / "s/manifest.json").exists()
    assert not list((tmp_path / "s").glob("*.bin"))


SIZES = {"65499": (65_499, np.uint16), "65500": (65_500, np.int32), "65536": (65_536, np.int32)}


def with_vocabulary(tokenizer, folder, size):
    """The same tokenizer with one more piece, of the id that makes its vocabulary this large."""
    shutil.copytree(tokenizer, folder)
    raw = json.loads((folder / "tokenizer.json").read_bytes())
    raw["model"]["vocab"]["zzz"] = size - 1
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("case", SIZES)
def test_ids_are_uint16_only_where_the_vocabulary_is_below_65500(tiny_tokenizer, tmp_path, data_prep, case):
    size, dtype = SIZES[case]
    tokenizer = with_vocabulary(tiny_tokenizer, tmp_path / "tokenizer", size)
    assert load_tokenizer_info(tokenizer).vocab_size == size
    (tmp_path / "a.jsonl").write_text('{"text": "the end"}\n')
    arguments = flags(tmp_path / "a.jsonl", tokenizer, tmp_path / "s")
    assert data_prep(*arguments).status == 0
    assert ShardSet.open(tmp_path / "s").shard(0).dtype == dtype
    assert (tmp_path / "s/000000.idx").read_bytes()[17] == {np.uint16: 8, np.int32: 4}[dtype]
    arguments[-1] = tmp_path / "forced"
    forced = data_prep(*arguments, "--dtype", "uint16")
    if size < 65_500:
        assert forced.status == 0
    else:
        assert f"has {size} ids, expected fewer than 65500" in forced.error
        assert not (tmp_path / "forced").exists()  # before the first byte


def test_every_option_is_in_the_jobs_key(tiny_tokenizer, tmp_path):
    """A key that leaves one out would call the shards of other options up to date."""
    (tmp_path / "a.jsonl").write_text('{"text": "the end"}\n')
    tokenize([str(tmp_path / "a.jsonl")], tiny_tokenizer, tmp_path / "s")
    job = json.loads((tmp_path / "s/manifest.json").read_bytes())["job"]
    assert {field.name for field in fields(TokenizeOptions)} <= set(job)
    assert {field.name for field in fields(ReadOptions)} == set(job["reading"])
    others = {"encoder": "reference", "dtype": "int32", "sentences": False, "shuffle_seed": 1}
    assert set(others) == {field.name for field in fields(TokenizeOptions)}
    for name, value in others.items():
        with pytest.raises(UserError, match="give --overwrite"):
            options = TokenizeOptions(**{name: value})
            tokenize([str(tmp_path / "a.jsonl")], tiny_tokenizer, tmp_path / "s", options=options)


def test_tokens_are_counted_by_input(tiny_shards, tiny_corpus, monkeypatch):
    content = json.loads((tiny_shards / "manifest.json").read_bytes())["content"]
    assert set(content["sources"]) == set(map(str, tiny_corpus.iterdir()))
    assert [source["documents"] for source in content["sources"].values()] == [120, 120]
    assert sum(source["tokens"] for source in content["sources"].values()) == content["tokens"]
    monkeypatch.setattr(tokenize_module, "_SOURCES_SHOWN", 1)
    parts = [Part("a", 0, 1, 1), Part("b", 0, 1, 1), Part("b", 1, 2, 1)]
    results = [{"documents": 1, "tokens": 5}, {"documents": 2, "tokens": 3}, {"documents": 1, "tokens": 3}]
    assert tokenize_module._sources(parts, results) == {"b": {"documents": 3, "tokens": 6}}


def test_sentence_starts_lie_beside_every_shard(tiny_shards, tiny_tokenizer, tiny_texts):
    """Decoded, every sentence of the plain texts begins where a sentence does."""
    shards = ShardSet.open(tiny_shards)
    encoder = Encoder(tiny_tokenizer)
    found = []
    for index, name in enumerate(shards.names):
        shard, sentences = shards.shard(index), Sentences(tiny_shards / name)
        assert sentences.documents == shard.documents
        for number in range(shard.documents):
            ids, starts = shard.document(number)[:-1], sentences.document(number).tolist()
            found.append([encoder.decode(ids[a:b]) for a, b in itertools.pairwise([*starts, len(ids)])])
    assert ["".join(parts) for parts in found] == tiny_texts
    plain = [number for number in range(len(tiny_texts)) if tiny_texts[number].isascii()]
    assert len(plain) > 200
    for number in plain:
        assert found[number] == re.findall(r" ?[^.]+\.", tiny_texts[number])


def test_without_sentences_there_are_no_sentence_files(tiny_corpus, tiny_tokenizer, tiny_shards, tmp_path):
    options = TokenizeOptions(sentences=False)
    tokenize([f"{tiny_corpus}/*.jsonl"], tiny_tokenizer, tmp_path / "s", options=options, part_bytes=PART_BYTES)
    expected = {name: content for name, content in contents(tiny_shards).items() if not name.endswith(".sentences")}
    assert contents(tmp_path / "s") == expected


def shuffled(corpus, tokenizer, folder, seed, workers=1, part_bytes=PART_BYTES):
    options = TokenizeOptions(shuffle_seed=seed)
    tokenize([f"{corpus}/*.jsonl"], tokenizer, folder, options=options, part_bytes=part_bytes, workers=workers)
    return all_ids(folder)


def test_a_shuffle_is_a_permutation_that_follows_the_seed_alone(
    tiny_corpus, tiny_tokenizer, tiny_shards, tmp_path, monkeypatch
):
    plain = all_ids(tiny_shards)
    first = shuffled(tiny_corpus, tiny_tokenizer, tmp_path / "1", seed=1)
    assert first == [plain[i] for i in permute(np.arange(240), 240, 1)]
    assert sorted(first) == sorted(plain) and first != plain
    assert shuffled(tiny_corpus, tiny_tokenizer, tmp_path / "2", seed=1, workers=2) == first
    assert shuffled(tiny_corpus, tiny_tokenizer, tmp_path / "3", seed=1, part_bytes=7_000) == first
    assert shuffled(tiny_corpus, tiny_tokenizer, tmp_path / "4", seed=2) != first
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert (tmp_path / "1/manifest.json").read_bytes() == (tmp_path / "2/manifest.json").read_bytes()
    assert {path.suffix for path in (tmp_path / "1").iterdir()} == {*SUFFIXES, ".json"}


def test_sentences_travel_along_when_documents_are_shuffled_into_several_shards(tiny_shards, tmp_path):
    plain = ShardSet.open(tiny_shards)
    source = [
        (plain.shard(i).document(n).tolist(), Sentences(tiny_shards / name).document(n).tolist())
        for i, name in enumerate(plain.names)
        for n in range(plain.documents[i])
    ]
    plan = {
        "prefixes": [str(tiny_shards / name) for name in plain.names],
        "documents": list(plain.documents),
        "dtype": "<u2",
        "seed": 9,
        "sentences": True,
        "shards": 7,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = []
    for number in range(7):
        prefix = tmp_path / f"{number:06d}"
        result = write_shuffled(str(tmp_path / "plan.json"), number, str(prefix), lambda documents, size: None)
        shard, sentences = Shard(prefix), Sentences(prefix)
        assert result["documents"] == shard.documents == sentences.documents
        found += [(shard.document(n).tolist(), sentences.document(n).tolist()) for n in range(shard.documents)]
    assert found == [source[i] for i in permute(np.arange(240), 240, 9)]


def test_a_folder_with_a_sentencepiece_model_alone_is_told_how_to_convert_it(tiny_corpus, tmp_path, data_prep):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/spiece.model").write_bytes(b"")
    error = data_prep(*flags(f"{tiny_corpus}/*.jsonl", tmp_path / "t", tmp_path / "s")).error
    assert "has no tokenizer.json, only spiece.model: convert it once with" in error and "save_pretrained" in error


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--input", "absent.jsonl", "absent.jsonl matches no file"),
        ("--input", ".", "is a folder: name its files"),
        ("--tokenizer", "absent", "tokenizer folder absent does not exist"),
        ("--tokenizer", ".", "has no tokenizer.json"),
    ],
)
def test_what_is_not_there_is_one_error(tiny_corpus, tiny_tokenizer, tmp_path, data_prep, flag, value, message):
    arguments = flags(f"{tiny_corpus}/*.jsonl", tiny_tokenizer, tmp_path / "s")
    arguments[arguments.index(flag) + 1] = value
    assert message in data_prep(*arguments).error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("flag", "value"), [("--workers", "0"), ("--workers", "x"), ("--part_megabytes", "0")])
def test_numbers_out_of_range_are_usage_errors(tmp_path, data_prep, flag, value):
    outcome = data_prep(*flags("a.jsonl", "t", tmp_path / "s"), flag, value)
    assert outcome.status == 2
    assert f"error: argument {flag}: '{value}': expected a" in outcome.stderr
