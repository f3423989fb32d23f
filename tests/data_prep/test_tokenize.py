"""Tokenizing is exact: the same bytes however many workers, killed or not, and nothing half-made has a final name."""

import gzip
import json
import os
import shutil
import signal
import time

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.durable import TEMPORARY_SUFFIX
from data_prep.encoding import load_tokenizer_info
from data_prep.errors import UserError
from data_prep.shards import Shard, ShardSet
from data_prep.tokenize import tokenize

PART_BYTES = 20_000


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


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
    assert len(contents(tiny_shards)) == 12
    assert contents(tmp_path / "s") == contents(tiny_shards)
    assert (tmp_path / "s/manifest.json").read_bytes() == (tiny_shards / "manifest.json").read_bytes()
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {".bin", ".idx", ".json"}


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
    assert set(contents(tmp_path / "s")) == {f"{name}{suffix}" for name in shards.names for suffix in (".bin", ".idx")}
    manifest = json.loads((tmp_path / "s/manifest.json").read_bytes())
    assert set(manifest["files"]) == set(contents(tmp_path / "s"))
    assert manifest["content"]["empty_documents"] == 20


def test_a_large_vocabulary_is_written_as_int32(tiny_tokenizer, tmp_path):
    """The same tokenizer with one more token, of id 65,499, needs 65,500 rows."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, tokenizer)
    raw = json.loads((tokenizer / "tokenizer.json").read_bytes())
    raw["model"]["vocab"]["zzz"] = 65_499
    (tokenizer / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer_info(tokenizer).vocab_size == 65_500
    (tmp_path / "a.jsonl").write_text('{"text": "the end"}\n')
    tokenize([f"{tmp_path}/a.jsonl"], tokenizer, tmp_path / "s")
    assert ShardSet.open(tmp_path / "s").shard(0).dtype == np.int32


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


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_continues_to_the_same_bytes(
    slow_job, tiny_tokenizer, tmp_path, start_data_prep, data_prep, signal_number
):
    output = tmp_path / "shards"
    arguments = [*flags(slow_job, tiny_tokenizer, output), "--part_megabytes", "0.2", "--workers", "2"]
    process = start_data_prep(*arguments)
    wait_for(lambda: len(list(output.glob(".parts/0*.json"))) >= 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    else:
        process.send_signal(signal_number)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 130, signal.SIGINT: 130}[signal_number]
    assert "Traceback" not in stderr
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    if signal_number != signal.SIGKILL:
        assert not list(output.rglob(f"*{TEMPORARY_SUFFIX}"))
        assert stderr.splitlines()[-1].endswith("stopped; run the same command again to continue")

    assert not (output / "manifest.json").exists()
    (output / f"000099.bin.1{TEMPORARY_SUFFIX}").write_bytes(b"of a killed process")
    done = [json.loads(path.read_bytes())["result"]["files"] for path in output.glob(".parts/0*.json")]
    kept = {name: (output / name).stat().st_mtime_ns for files in done for name in files}
    assert len(kept) >= 6
    again = data_prep(*arguments)
    assert again.status == 0 and f"{len(done)} of 21 parts were done before" in again.stdout
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.suffix for path in output.iterdir()} == {".bin", ".idx", ".json"}

    if signal_number == signal.SIGKILL:
        tokenize([str(slow_job)], tiny_tokenizer, tmp_path / "whole", part_bytes=200_000, workers=2)
        assert contents(output) == contents(tmp_path / "whole")
        assert (output / "manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_ctrl_c_while_the_workers_start_is_no_traceback(slow_job, tiny_tokenizer, tmp_path, start_data_prep):
    process = start_data_prep(
        *flags(slow_job, tiny_tokenizer, tmp_path / "s"), "--part_megabytes", "1", "--workers", "2"
    )
    # The resource tracker and two workers, which are importing their modules.
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 3)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in stderr


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
BAD_INPUTS = {
    "malformed JSON": ("a.jsonl", GOOD + b'{"text": oops}\n' + GOOD, "a.jsonl:61: not JSON"),
    "missing field": ("a.jsonl", GOOD + b'{"body": "x"}\n', "a.jsonl:61: no field 'text' (found: body"),
    "not a string": ("a.jsonl", GOOD + b'{"text": 1}\n', "a.jsonl:61: 'text' is not a string"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:61: not UTF-8"),
    "lone surrogate": ("a.jsonl", GOOD + b'{"text": "\\udc80"}\n', "a.jsonl:61: 'text' holds a lone surrogate"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-12], "a.jsonl.gz: cannot be read to its end"),
    "not Parquet": ("a.parquet", b"no table", "a.parquet: not a readable Parquet file"),
    "empty corpus": ("a.jsonl", b"", "the input holds no text: 1 files such as"),
    "blank corpus": ("a.jsonl", b'{"text": " "}\n\n', "the input holds no text: 1 files such as"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_error_and_leaves_nothing_that_looks_finished(tiny_tokenizer, tmp_path, data_prep, case):
    name, content, message = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "s"
    outcome = data_prep(*flags(tmp_path / name, tiny_tokenizer, output), "--part_megabytes", "0.001", "--workers", "2")
    assert message in outcome.error
    assert not (output / "manifest.json").exists()
    assert not list(output.rglob(f"*{TEMPORARY_SUFFIX}"))
    for index in output.glob("*.idx"):  # parts that were done before the bad line are whole
        assert Shard(index.with_suffix("")).documents > 0
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        ShardSet.open(output)


def test_a_mended_line_continues_without_an_old_part(tiny_tokenizer, tmp_path, data_prep):
    path = tmp_path / "a.jsonl"
    arguments = [*flags(path, tiny_tokenizer, tmp_path / "s"), "--part_megabytes", "0.001", "--workers", "1"]
    path.write_bytes(GOOD + b'{"text": a line to remove}\n')
    assert "a.jsonl:61" in data_prep(*arguments).error
    path.write_bytes(GOOD[GOOD.index(b"\n") + 1 :])  # one line fewer at the start, too: everything moves
    assert data_prep(*arguments).status == 0
    tokenize([str(path)], tiny_tokenizer, tmp_path / "whole", part_bytes=1000)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert len(all_ids(tmp_path / "s")) == 59


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
