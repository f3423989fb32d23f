"""run does a whole job from one file."""

import json
import os
import signal
import time
from pathlib import Path

import pytest


@pytest.fixture
def job(tiny_corpus, tmp_path):
    """A job of all stages; rewritten with `changes`, a mapping from stages to the text of their flags."""

    def write(**changes):
        stages = {
            "builtin_corpus": f"{{output_dir: {tmp_path}/documents, max_megabytes: 0.05, workers: 1}}",
            "train_tokenizer": f"{{input: [{tiny_corpus}/*.jsonl], output_dir: {tmp_path}/tokenizer, type: wordpiece,"
            " vocab_size: 500, lowercase: false}",
            "tokenize": f"{{input: [{tiny_corpus}/*.jsonl, {tmp_path}/documents/*.jsonl], workers: 1,"
            f" tokenizer: {tmp_path}/tokenizer, output_dir: {tmp_path}/shards}}",
            "pack": f"[{{shards: {tmp_path}/shards, objective: causal, sequence_length: 64}},"
            f" {{shards: {tmp_path}/shards, objective: mlm, sequence_length: 32}}]",
        } | changes
        path = tmp_path / "job.yaml"
        path.write_text("".join(f"{stage}: {flags}\n" for stage, flags in stages.items()))
        return path

    return write


def test_run_does_all_stages_and_a_second_run_makes_nothing(job, tmp_path, data_prep):
    path = job()
    first = data_prep("run", path)
    assert first.status == 0, first.stderr
    assert [line for line in first.stdout.splitlines() if line.startswith("==")] == [
        *("== builtin_corpus", "== train_tokenizer", "== tokenize", "== pack", "== pack")
    ]
    assert len(list((tmp_path / "shards/samples").iterdir())) == 2
    # `lowercase: false` reaches the stage as --no-lowercase.
    assert json.loads((tmp_path / "tokenizer/tokenizer.json").read_bytes())["normalizer"]["lowercase"] is False
    for folder in ("documents", "tokenizer", "shards"):
        assert data_prep("verify", tmp_path / folder).status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = data_prep("run", path)
    assert second.status == 0 and second.stdout.count("up to date") == 5
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenise": "{}"}, "unknown stage 'tokenise'; did you mean tokenize?"),
        ({"run": "{}"}, "unknown stage 'run'"),
        ({"pack": "{shard: x}"}, "pack: unknown flag 'shard'; did you mean shards?"),
        ({"pack": "{shards: }"}, "pack: shards has no value"),
        ({"pack": "5"}, "pack: expected a mapping of flags, found 5"),
        ({"pack": "{a: [}"}, "job.yaml is not YAML"),
    ],
)
def test_a_wrong_job_is_one_error_before_any_stage_runs(job, tmp_path, data_prep, changes, message):
    outcome = data_prep("run", job(**changes))
    assert message in outcome.error and "job.yaml" in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


def test_a_missing_or_wrong_value_is_found_before_any_stage_runs(job, tmp_path, data_prep):
    for flags, message in [
        ("{shards: x}", "the following arguments are required: --objective, --sequence_length"),
        ("{shards: x, objective: diffusion, sequence_length: 8}", "argument --objective: invalid choice: 'diffusion'"),
    ]:
        assert f"job.yaml: pack: {message}" in data_prep("run", job(pack=flags)).error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


def test_a_job_file_that_is_absent_or_empty_is_one_error(tmp_path, data_prep):
    assert "No such file" in data_prep("run", tmp_path / "absent.yaml").error
    (tmp_path / "empty.yaml").write_text("")
    assert "expected a mapping from stages to their flags" in data_prep("run", tmp_path / "empty.yaml").error


# ------------------------------------------------------------------------------------------- stages that stream on

CLEAN = "{input: [%s/*.jsonl], rules: [length, symbol_ratio], set: [length.min_words=5], part_megabytes: 0.01%s}"


@pytest.fixture(scope="module")
def noisy(tiny_corpus, tmp_path_factory):
    """The tiny corpus with copies, blank and short documents, and a line that is no JSON."""
    folder = tmp_path_factory.mktemp("noisy")
    texts = [json.loads(line)["text"] for path in sorted(tiny_corpus.glob("*.jsonl")) for line in path.open()]
    lines = [
        json.dumps({"id": f"d{n}", "text": text}) for n, text in enumerate([*texts, *texts[:20], "too short", " "])
    ]
    (folder / "a.jsonl").write_text("\n".join([*lines[::2], "{no json"]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[1::2]) + "\n")
    return folder


@pytest.fixture
def chain(noisy, tiny_tokenizer, tmp_path):
    """Writes a job of chains, (stage, flags) each, and gives its path."""

    def write(name, *stages):
        path = tmp_path / f"{name}.yaml"
        path.write_text("".join(f"- {stage}: {flags}\n" for stage, flags in stages))
        return path

    return write


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_bytes())["content"]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".sentences")}


def tokenize_flags(tokenizer, output, **flags):
    more = "".join(f", {name}: {value}" for name, value in flags.items())
    return f"{{tokenizer: {tokenizer}, output_dir: {output}, workers: 1{more}}}"


def streamed(chain, noisy, tokenizer, output, **flags):
    return chain(
        output.name,
        ("clean", CLEAN % (noisy, "")),
        ("deduplicate", "{}"),
        ("tokenize", tokenize_flags(tokenizer, output, max_bad_fraction=0.1, **flags)),
    )


def test_streamed_stages_make_the_shards_of_stages_that_keep_their_documents(
    chain, noisy, tiny_tokenizer, tmp_path, data_prep
):
    kept = chain(
        "kept",
        ("clean", CLEAN % (noisy, f", output_dir: {tmp_path}/clean, max_bad_fraction: 0.1")),
        ("deduplicate", f"{{input: [{tmp_path}/clean/*.jsonl], output_dir: {tmp_path}/unique}}"),
        ("tokenize", f"{{input: [{tmp_path}/unique/*.jsonl], " + tokenize_flags(tiny_tokenizer, tmp_path / "kept")[1:]),
    )
    assert data_prep("run", kept).status == 0
    outcome = data_prep("run", streamed(chain, noisy, tiny_tokenizer, tmp_path / "streamed"))
    assert outcome.status == 0, outcome.stderr
    assert "== clean -> deduplicate -> tokenize" in outcome.stdout
    assert "deduplicate: 20 documents removed" in outcome.stdout
    assert shard_bytes(tmp_path / "streamed") == shard_bytes(tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["clean", "kept", "streamed", "unique"]
    assert not (tmp_path / "streamed/.parts").exists()
    assert data_prep("verify", tmp_path / "streamed").status == 0
    of_stream, clean = manifest_of(tmp_path / "streamed"), manifest_of(tmp_path / "clean")
    for key in ("read", "rejected_documents", "lines"):
        assert of_stream[key] == clean[key]
    assert of_stream["rejected_documents"] == {"empty": 1, "malformed": 1}
    assert of_stream["lengths"]["read"] == clean["lengths"]["read"]
    assert of_stream["lengths"]["left"] == manifest_of(tmp_path / "unique")["lengths"]["left"]
    assert of_stream["steps"]["clean"] == clean["steps"]["clean"]
    assert of_stream["steps"]["deduplicate"] == manifest_of(tmp_path / "unique")["steps"]["deduplicate"]
    assert of_stream["duplicates"] == manifest_of(tmp_path / "unique")["duplicates"]
    assert (tmp_path / "streamed/rejected.jsonl").read_bytes() == (tmp_path / "clean/rejected.jsonl").read_bytes()
    samples = json.loads((tmp_path / "streamed/samples.json").read_bytes())
    for sample in samples["deduplicate"]["exact"]:  # places are those of the input, not of what was kept on the way
        for place in (sample["place"], sample["kept"]):
            path, line = place.rsplit(":", 1)
            text = json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"]
            assert text.split()[:5] == sample["text"].split()[:5]


def test_a_streamed_job_gives_the_same_bytes_with_two_workers_and_as_an_array(
    chain, noisy, tiny_tokenizer, tmp_path, data_prep
):
    for flags in ({}, {"shuffle_seed": 3}):
        expected = None
        for number, given in enumerate(([], ["--workers", "2"], ["--task_index", "0", "--num_tasks", "1"])):
            output = tmp_path / f"out{len(flags)}{number}"
            outcome = data_prep("run", streamed(chain, noisy, tiny_tokenizer, output, **flags), *given)
            assert outcome.status == 0, outcome.stderr
            found = shard_bytes(output), manifest_of(output)["steps"], manifest_of(output)["duplicates"]
            expected = expected or found
            assert found == expected


def test_a_streamed_job_is_up_to_date_until_any_link_changes(chain, noisy, tiny_tokenizer, tmp_path, data_prep):
    job = streamed(chain, noisy, tiny_tokenizer, tmp_path / "out")
    assert data_prep("run", job).status == 0
    assert f"{tmp_path}/out: up to date" in data_prep("run", job).stdout
    for before, after in [("min_words=5", "min_words=6"), ("deduplicate: {}", "deduplicate: {methods: [exact]}")]:
        changed = tmp_path / "changed.yaml"
        changed.write_text(job.read_text().replace(before, after))
        assert "holds the result of another job" in data_prep("run", changed).error


@pytest.mark.parametrize("reached", ["signatures-000000.bin", "drops-000000.bin", "encoder.json"])
def test_a_streamed_job_killed_in_any_phase_goes_on_to_the_same_bytes(
    chain, noisy, tiny_tokenizer, tmp_path, data_prep, start_data_prep, reached
):
    assert data_prep("run", streamed(chain, noisy, tiny_tokenizer, tmp_path / "whole")).status == 0
    job = streamed(chain, noisy, tiny_tokenizer, tmp_path / "out")
    process = start_data_prep("run", job)
    while process.poll() is None and not (tmp_path / "out/.parts/scratch" / reached).exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/manifest.json").exists()
    assert data_prep("run", job).status == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    for key in ("steps", "duplicates", "read", "rejected_documents"):
        assert manifest_of(tmp_path / "out")[key] == manifest_of(tmp_path / "whole")[key]


def test_cleaning_may_come_after_deduplication(chain, noisy, tiny_tokenizer, tmp_path, data_prep):
    cleaning = "{rules: [length], set: [length.min_words=5]"
    job = chain(
        "after",
        ("deduplicate", f"{{input: [{noisy}/*.jsonl]}}"),
        ("clean", f"{cleaning}, output_dir: {tmp_path}/out, max_bad_fraction: 0.1}}"),
        ("deduplicate", f"{{input: [{noisy}/*.jsonl]}}"),
        ("clean", cleaning + "}"),
        ("tokenize", tokenize_flags(tiny_tokenizer, tmp_path / "shards", max_bad_fraction=0.1)),
    )
    outcome = data_prep("run", job)
    assert outcome.status == 0, outcome.stderr
    content = manifest_of(tmp_path / "out")
    assert list(content["steps"]) == ["deduplicate", "clean"]
    removed = [sum(content["steps"][name]["removed"].values()) for name in content["steps"]]
    assert removed[0] == 20 and content["documents"] == content["read"]["documents"] - sum(removed)
    assert manifest_of(tmp_path / "shards")["documents"] == content["documents"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("clean", "{input: [x]}")], "clean, the last stage, has no output_dir"),
        ([("clean", "{input: [x]}"), ("clean", "{output_dir: y}")], "clean stands twice in one chain"),
        ([("clean", "{input: [x]}"), ("tokenize", "{input: [z], tokenizer: t, output_dir: y}")], "remove input"),
        ([("clean", "{input: [x]}"), ("pack", "{shards: s, objective: mlm, sequence_length: 8}")], "pack cannot take"),
    ],
)
def test_a_chain_that_cannot_be_is_one_error(chain, tmp_path, data_prep, stages, message):
    assert message in data_prep("run", chain("wrong", *stages)).error
