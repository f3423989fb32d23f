"""verify finds every damaged byte of a data set and names its file."""

import json
import random
import shutil

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest, read_manifest
from data_prep.plan import PackSettings, write_plan
from data_prep.shards import ShardSet, ShardWriter
from data_prep.verify import file_faults, uncovered, verify
from tests.data_prep.made_folders import make_documents, make_shards, make_tokenizer

TEXTS = [f"document {number} of the corpus, {'word ' * (number % 7)}ends here" for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("verify") / "tokenizer", TEXTS)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    steps = {"rules": {"removed": {"short": 4}}}
    samples = {"rules": {"short": [{"key": 1, "place": "a:1", "text": "x"}]}}
    rejected = [{"file": "a", "line": 3, "category": "json", "reason": "not JSON"}]
    folder = tmp_path_factory.mktemp("verify") / "documents"
    return make_documents(folder, TEXTS, TEXTS[4:], steps=steps, samples=samples, rejected=rejected)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    folder = make_shards(tmp_path_factory.mktemp("verify") / "shards", TEXTS, tokenizer)
    for settings in (PackSettings("causal", 16, "concatenate", 0.1), PackSettings("mlm", 24, "best_fit", 0.1)):
        write_plan(ShardSet.open(folder), settings)
    return folder


@pytest.mark.parametrize("kind", ["shards", "tokenizer", "documents"])
def test_one_flipped_byte_anywhere_is_found_and_its_file_named(kind, request, tmp_path):
    """Every file, `manifest.json`, plans, samples and rejections included; sixty random bytes of each."""
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(kind), folder)
    verify(folder)
    generator = random.Random(7)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert kind != "shards" or {path.suffix for path in paths} == {
        ".bin",
        ".idx",
        ".sentences",
        ".json",
        ".samples",
        ".pieces",
    }
    for path in paths:
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= generator.randrange(1, 256)
            path.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                verify(folder)
            assert str(path) in str(error.value), (path, damaged)
        path.write_bytes(content)
    verify(folder)


@pytest.mark.parametrize("kind", ["shards", "documents"])
def test_white_space_of_a_manifest_or_a_plan_is_part_of_it(kind, request, tmp_path):
    """A space that became a tab changes no value, yet it is a flipped byte."""
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(kind), folder)
    for path in [folder / "manifest.json", *folder.glob("samples/*/plan.json")]:
        content = path.read_bytes()
        for position in [content.index(b" "), len(content) - 1]:
            path.write_bytes(content[:position] + b"\t" + content[position + 1 :])
            assert json.loads(path.read_bytes()) == json.loads(content)
            with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
                verify(folder)
        path.write_bytes(content)


def test_missing_shortened_and_lengthened_files_are_all_named_at_once(shards, tmp_path, data_prep):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    (folder / "000000.bin").unlink()
    for name, change in (("000001.bin", lambda raw: raw[:-1]), ("000000.idx", lambda raw: raw + b"\0")):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    outcome = data_prep("verify", folder)
    assert outcome.status == 1 and "3 faults" in outcome.stderr
    size = read_manifest(folder).files["000001.bin"].bytes
    for message in ("000000.bin: missing", f"000001.bin: {size - 1} bytes, expected {size}", "000000.idx: "):
        assert f"{folder}/{message}" in outcome.stderr


def test_every_folder_is_checked_whatever_is_wrong_with_those_before_it(shards, tokenizer, tmp_path, data_prep):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    (folder / "000001.idx").unlink()
    outcome = data_prep("verify", folder, tmp_path, tokenizer)
    assert outcome.status == 1
    assert (
        f"{folder}/000001.idx: missing" in outcome.stderr and f"{tmp_path}/manifest.json is missing" in outcome.stderr
    )
    assert f"{tokenizer}: tokenizer, 2 files" in outcome.stdout and "all as they were written" in outcome.stdout


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_faults_are_the_same_however_many_threads_look_and_all_bytes_are_reported(shards, tmp_path, workers):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    for name in ("000000.sentences", "000001.bin"):
        raw = bytearray((folder / name).read_bytes())
        raw[1] ^= 1
        (folder / name).write_bytes(raw)
    manifest, reported = read_manifest(folder), []
    faults = file_faults(folder, manifest, reported.append, workers)
    assert [fault.split(": ")[0] for fault in faults] == [f"{folder}/000000.sentences", f"{folder}/000001.bin"]
    assert sum(reported) == sum(record.bytes for record in manifest.files.values())


def rewritten(folder, source, documents):
    """A copy of `source` whose first shard holds other documents, with matching checksums."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "samples")
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


def test_verify_finds_what_checksums_cannot_see(shards, tmp_path):
    tokenizer = read_manifest(shards).content["tokenizer"]
    end, size = tokenizer["end_of_document"], tokenizer["vocab_size"]
    verify(rewritten(tmp_path / "fine", shards, [[9, end], [size - 1, end]]))
    for name, documents, message in [
        ("beyond", [[9, end], [size, end]], f"000000.bin: holds id {size}, the vocabulary has {size}"),
        ("no end", [[9, end], [9]], f"000000.bin: a document does not end with id {end}"),
        ("empty", [[9, end], []], f"000000.bin: a document does not end with id {end}"),
    ]:
        with pytest.raises(UserError, match=message):
            verify(rewritten(tmp_path / name, shards, documents))


def test_counts_that_do_not_add_up_are_found(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    manifest = read_manifest(folder)
    content = manifest.content | {"documents": manifest.content["documents"] + 1}
    Manifest("shards", manifest.job, manifest.files, content).write(folder)
    with pytest.raises(UserError, match="counts do not add up"):
        verify(folder)


def test_a_plan_of_other_shards_or_settings_is_found(shards, tokenizer, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    [plan] = folder.glob("samples/causal-*")
    shutil.copytree(plan, plan.with_name("causal-concatenate-17-validation-0.1"))
    with pytest.raises(UserError, match=r"17-validation-0\.1/plan\.json: is not the plan of these shards; remove"):
        verify(folder)
    other = make_shards(tmp_path / "other", TEXTS[:30], tokenizer)
    (other / "samples").mkdir()
    shutil.copytree(plan, other / "samples" / plan.name)
    with pytest.raises(UserError, match=f"{plan.name}/plan.json: names other shards"):
        verify(other)


def test_files_that_nothing_covers_are_said_to_be_outside(shards, tmp_path, data_prep):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    assert uncovered(folder, read_manifest(folder)) == []
    (folder / "notes.txt").write_text("mine")
    outcome = data_prep("verify", folder)
    assert outcome.status == 0
    assert f"not part of it, not checked: 1 files, such as {folder}/notes.txt" in outcome.stdout


def test_an_unreadable_file_is_a_fault_and_the_others_are_checked(documents, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(documents, folder)
    size = (folder / "documents-000000.jsonl").stat().st_size
    (folder / "documents-000000.jsonl").unlink()
    (folder / "documents-000000.jsonl").mkdir()  # root may read any file, but nobody a folder
    manifest = read_manifest(folder)
    record = FileRecord((folder / "documents-000000.jsonl").stat().st_size, "0" * 64)
    manifest = Manifest("documents", {}, manifest.files | {"documents-000000.jsonl": record})
    assert size and "documents-000000.jsonl: cannot be read" in file_faults(folder, manifest, lambda _: None)[0]
