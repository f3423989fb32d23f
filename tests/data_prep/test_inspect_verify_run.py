"""verify finds every damaged byte, inspect shows what is there, run does a whole job from one file."""

import json
import random
import shutil

import numpy as np
import pytest

from data_prep.inspect import histogram
from data_prep.manifest import FileRecord, Manifest, read_manifest
from data_prep.shards import ShardWriter


@pytest.fixture(scope="module")
def tiny_documents(tmp_path_factory, tiny_corpus):
    """`tiny_corpus` as a stage leaves documents: with a manifest."""
    folder = tmp_path_factory.mktemp("documents")
    for path in tiny_corpus.iterdir():
        shutil.copy(path, folder)
    files = {path.name: FileRecord.of(path) for path in folder.iterdir()}
    Manifest("documents", {"command": "builtin_corpus"}, files, {"documents": 240}).write(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny_shards", "tiny_tokenizer", "tiny_documents"])
def test_verify_names_the_file_of_one_flipped_bit(kind, request, tmp_path, data_prep):
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(kind), folder)
    whole = data_prep("verify", folder)
    assert whole.status == 0 and "all as they were written" in whole.stdout
    generator = random.Random(7)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for _ in range(4):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            outcome = data_prep("verify", folder)
            assert outcome.status == 1 and str(path) in outcome.stderr, path
            assert "Traceback" not in outcome.stderr
        path.write_bytes(content)
    assert data_prep("verify", folder).status == 0


def test_verify_names_missing_files_and_checks_every_folder(tiny_shards, tiny_tokenizer, tmp_path, data_prep):
    shutil.copytree(tiny_shards, tmp_path / "s")
    (tmp_path / "s/000002.bin").unlink()
    outcome = data_prep("verify", tiny_tokenizer, tmp_path / "s")
    assert outcome.status == 1 and f"{tmp_path}/s/000002.bin: missing" in outcome.stderr
    assert str(tiny_tokenizer) in outcome.stdout
    assert "manifest.json is missing" in data_prep("verify", tmp_path).error


def rewritten(folder, source, documents):
    """A copy of `source` whose first shard holds other documents, with matching checksums."""
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest.content["dtype"]).newbyteorder("<")
    with ShardWriter(folder / "000000", dtype) as writer:
        for ids in documents:
            writer.append(np.array(ids))
    content = json.loads(json.dumps(manifest.content))
    for name, new in (("documents", writer.documents), ("tokens", writer.tokens)):
        content[name] += new - content["shards"][0][name]
        content["shards"][0][name] = new
    Manifest("shards", manifest.job, manifest.files | writer.files, content).write(folder)
    return folder


def test_verify_finds_what_checksums_cannot_see(tiny_shards, tmp_path, data_prep):
    end = read_manifest(tiny_shards).content["tokenizer"]["end_of_document"]
    for name, documents, message in [
        ("fine", [[9, end], [767, end]], None),
        ("beyond", [[9, end], [768, end]], "000000.bin: holds id 768, the vocabulary has 768"),
        ("no end", [[9, end], [9]], f"000000.bin: a document does not end with id {end}"),
    ]:
        outcome = data_prep("verify", rewritten(tmp_path / name, tiny_shards, documents))
        assert outcome.status == (1 if message else 0)
        assert message is None or message in outcome.stderr


def test_inspect_shows_shards_as_text(tiny_shards, tiny_tokenizer, tiny_texts, data_prep):
    shown = data_prep("inspect", tiny_shards, "--tokenizer", tiny_tokenizer, "--characters", 60)
    assert shown.status == 0
    assert tiny_texts[0][:60] in shown.stdout
    assert "".join(f"  | {line}\n" for line in (tiny_texts[-1][:60] + "...").splitlines()) in shown.stdout
    content = read_manifest(tiny_shards).content
    assert f"{content['tokens']:,}" in shown.stdout and "nats a token" in shown.stdout
    assert content["tokenizer"]["fingerprint"][:12] in shown.stdout
    # The histogram counts every document once.
    rows = [line.split(" tokens ")[1] for line in shown.stdout.splitlines() if " tokens " in line and " - " in line]
    assert sum(int(row.split()[0].replace(",", "")) for row in rows) == 240


def test_inspect_shows_documents_and_tokenizers(tiny_documents, tiny_tokenizer, tiny_texts, data_prep):
    shown = data_prep("inspect", tiny_documents, "--documents", 3, "--characters", 50)
    for text in tiny_texts[:3]:
        assert f"  | {text[:50].splitlines()[0]}" in shown.stdout
    assert "longest pieces" in data_prep("inspect", tiny_tokenizer).stdout


def test_inspect_refuses_another_tokenizer_than_the_shards(tiny_shards, tiny_tokenizer, tmp_path, data_prep):
    shutil.copytree(tiny_tokenizer, tmp_path / "t")
    (tmp_path / "t/added_tokens.json").write_text("{}")
    outcome = data_prep("inspect", tiny_shards, "--tokenizer", tmp_path / "t")
    assert "name the tokenizer that made them" in outcome.error


def test_a_histogram_counts_by_powers_of_two():
    lines = histogram(np.array([1, 2, 3, 3, 4, 7, 8, 30]), "tokens").splitlines()
    found = [(line.split()[0], line.split()[2], line.split()[4], line.count("█")) for line in lines]
    assert found == [
        ("1", "1", "1", 13),
        ("2", "3", "3", 40),
        ("4", "7", "2", 27),
        ("8", "15", "1", 13),
        ("16", "31", "1", 13),
    ]


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
