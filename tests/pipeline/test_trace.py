"""One command names every document of a step and shows it as the model saw it."""

import json
import shutil

import numpy as np
import pytest
import yaml

from data_prep.encoding import Encoder
from data_prep.shards import ShardSet
from pipeline.data import open_data, plan_samples
from pipeline.provenance import record_run
from pipeline.recipe import check_recipe
from pipeline.samples import IGNORED
from pipeline.trace import main, shown


@pytest.fixture
def run(tmp_path, tiny_shards, tiny_tokenizer):
    """run(objective, **sections) -> (folder of a run that has not trained yet, its data)."""

    def make(objective="causal", **sections):
        shards = {"left": shutil.copytree(tiny_shards, tmp_path / "left"), "right": tiny_shards}
        raw = {
            "objective": objective,
            "model": {"config": "demo-gpt"},
            "data": {
                "shards": {name: str(folder) for name, folder in shards.items()},
                "weights": {"left": 0.75, "right": 0.25},
                "tokenizer": str(tiny_tokenizer),
                "sequence_length": 64,
                "validation_fraction": 0.1,
            },
            "training": {"global_batch_size": {0: 4, 10: 8}, "max_steps": 20},
            "optimizer": {"lr": 1e-3},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section}
        recipe = check_recipe(yaml.safe_load(yaml.safe_dump(raw)), "test")
        plan_samples(recipe)
        data = open_data(recipe)
        record_run(tmp_path / "run", recipe, {}, data, {})
        return tmp_path / "run", data

    return make


def traced(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    shown_ = capsys.readouterr()
    return status, shown_.out, shown_.err


def test_the_documents_of_a_step_are_named_with_corpus_shard_document_bytes_and_epoch(run, capsys):
    folder, data = run()
    status, out, _ = traced(capsys, "--output_dir", folder, "--step", 12, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    # Steps 1 to 10 take 4 samples, step 11 on 8: step 12 begins at 48.
    assert status == 0 and [row["consumed_as"] for row in rows] == list(range(48, 56))
    numbers = np.arange(48, 56)
    places, batch = data.train.order.place(numbers), data.train.batch(numbers)
    assert [row["corpus"] for row in rows] == [("left", "right")[corpus] for corpus in places.corpus]
    assert [row["epoch"] for row in rows] == places.epoch.tolist()
    for row, inputs, labels in zip(rows, batch.input_ids, batch.labels, strict=True):
        raw = b""
        for stretch in row["documents"]:
            with open(stretch["shard"], "rb") as file:
                file.seek(stretch["begin_byte"])
                raw += file.read(stretch["end_byte"] - stretch["begin_byte"])
            shards = ShardSet.open(data.corpora[("left", "right").index(row["corpus"])].shards.folder)
            shard = shards.shard([f"{name}.bin" for name in shards.names].index(stretch["shard"].split("/")[-1]))
            document = shard.document(stretch["document"])
            first = stretch["begin_byte"] // 2 - shard.document_offset(stretch["document"])
            assert (first, len(document)) == (stretch["first"], stretch["document_tokens"])
        assert np.frombuffer(raw, "<u2").tolist() == [*inputs.tolist(), int(labels[-1])]


def test_lines_for_people_say_the_same(run, capsys):
    folder, _ = run()
    _, as_json, _ = traced(capsys, "--output_dir", folder, "--step", 1, "--sample", 2, "--json")
    row = json.loads(as_json)
    status, out, _ = traced(capsys, "--output_dir", folder, "--step", 1, "--sample", 2)
    assert status == 0 and out.startswith("sample 2: number 2 of the run; corpus ")
    for stretch in row["documents"]:
        assert f"{stretch['shard']}  document {stretch['document']}" in out
        assert f"bytes {stretch['begin_byte']:,} to {stretch['end_byte']:,}" in out
    assert "---" not in out


def test_text_shows_masks_and_where_documents_begin(run, capsys):
    folder, data = run("mlm", data={"packing": "best_fit"})
    status, out, _ = traced(capsys, "--output_dir", folder, "--step", 3, "--sample", 1, "--text")
    batch = data.train.batch(np.array([9]), 2)
    encoder = Encoder(folder / "tokenizer")
    assert status == 0
    for begin in batch.boundaries[:-1]:
        assert f"positions {begin} to " in out
    targets = np.flatnonzero(batch.labels[0] != IGNORED)
    assert len(targets) > 2
    for position in targets:
        token, target = batch.input_ids[0, position], batch.labels[0, position]
        assert f"{{{encoder.decode([token])}>{encoder.decode([target])}}}" in out
    assert out.count("[CLS]") == out.count("[SEP]") >= 1


def test_tokens_that_are_left_out_of_a_causal_loss_are_marked(run):
    folder, data = run(causal={"goldfish_k": 3, "goldfish_context": 2})
    encoder = Encoder(folder / "tokenizer")
    batch = data.train.batch(np.array([5]))
    text = shown(batch, encoder, causal=True)
    left_out = np.flatnonzero(batch.labels[0, :-1] == IGNORED) + 1
    marks = [f"({encoder.decode([token])})" for token in batch.input_ids[0, left_out]]
    assert len(marks) > 5 and all(mark in text for mark in marks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "0"), "--step is 0, expected 1 or more"),
        (("--step", "3", "--sample", "4"), "--sample is 4, but step 3 has samples 0 to 3"),
    ],
)
def test_what_is_not_there_is_one_line(run, capsys, arguments, message):
    folder, _ = run()
    status, out, err = traced(capsys, "--output_dir", folder, *arguments)
    assert (status, out) == (1, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_folder_that_is_no_run_and_shards_that_are_not_the_runs_are_refused(run, capsys, tmp_path):
    status, _, err = traced(capsys, "--output_dir", tmp_path, "--step", 1)
    assert status == 1 and "is no run: it has no run.json" in err
    folder, _ = run()
    record = json.loads((folder / "run.json").read_bytes())
    record["corpora"]["left"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    status, _, err = traced(capsys, "--output_dir", folder, "--step", 1)
    assert status == 1 and "the shards' fingerprint of left was" in err


def test_it_neither_imports_torch_nor_needs_a_checkpoint(run, tmp_path):
    import subprocess
    import sys

    folder, _ = run()
    code = (
        "import sys; from pipeline.trace import main;"
        f" main(['--output_dir', {str(folder)!r}, '--step', '1', '--text']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
