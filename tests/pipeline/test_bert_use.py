"""`pipeline.fill_mask` and `pipeline.embed` give what transformers gives."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import embed, fill_mask
from pipeline.embed import normalized, sentence_vectors
from pipeline.exported import load_exported
from tests.made_models import made_model

LINES = ["The teacher counts the first letter.", "", "x", "every worker keeps a list", "[MASK] is text here"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return made_model(tmp_path_factory.mktemp("bert"), "mlm", tiny_tokenizer)


@pytest.fixture
def run(folder, capsys):
    def run(command, *arguments):
        status = command.main(["--model", str(folder), *map(str, arguments)])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def test_fillings_are_those_of_transformers_pipeline(folder, run, tmp_path):
    from transformers import pipeline

    texts = ["The [MASK] counts.", "[MASK]", "every worker [MASK] a [MASK] of names", "a" * 40 + " [MASK]"]
    (tmp_path / "texts.txt").write_text("".join(text + "\n" for text in texts))
    done = run(fill_mask, "--input", tmp_path / "texts.txt", "--top_k", 7, "--json")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["text"] for record in records] == texts
    theirs = pipeline("fill-mask", model=str(folder), top_k=7)
    for text, record in zip(texts, records, strict=True):
        expected = theirs(text)
        masks = [expected] if isinstance(expected[0], dict) else expected
        assert len(record["masks"]) == len(masks) == text.count("[MASK]")
        for found, of_mask in zip(record["masks"], masks, strict=True):
            assert [filling["token"] for filling in found] == [one["token_str"] for one in of_mask]
            assert [filling["probability"] for filling in found] == pytest.approx(
                [one["score"] for one in of_mask], rel=1e-4
            )
            if text.count("[MASK]") == 1:
                assert [filling["text"] for filling in found] == [one["sequence"] for one in of_mask]


def test_a_table_shows_each_mask(run):
    done = run(fill_mask, "--text", "a [MASK] b [MASK]", "--top_k", 2)
    lines = done.out.splitlines()
    assert lines[0] == "a [MASK] b [MASK]" and lines[1] == "  mask 1" and lines[4] == "  mask 2" and len(lines) == 7
    assert "[MASK]" in lines[2], "the other mask stays"
    for number, message in ((0, "--top_k is 0, expected 1 to the 768"), (769, "--top_k is 769")):
        assert message in run(fill_mask, "--text", "[MASK]", "--top_k", number).err
    assert run(fill_mask, "--text", "none here").err.startswith("error: 'none here' has no [MASK]")
    assert "tokens, the model 64 positions; shorten it" in run(fill_mask, "--text", "[MASK]" * 70).err


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_the_hidden_states_of_transformers_model(pooling, folder, run, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    (tmp_path / "lines.txt").write_text("".join(line + "\n" for line in LINES))
    done = run(embed, "--input", tmp_path / "lines.txt", "--output", tmp_path / "vectors.npy", "--pooling", pooling)
    assert done.out == f"{tmp_path / 'vectors.npy'}: 5 vectors of 32 numbers ({pooling})\n"
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (5, 32) and vectors.dtype == np.float32
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for line, vector in zip(LINES[:4], vectors[:4], strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(line, return_tensors="pt")).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        assert np.allclose(vector, expected.numpy(), atol=1e-5)


def test_text_is_text_and_long_lines_are_cut(folder):
    exported = load_exported(folder, "mlm")
    long = "x y " * 100
    vectors, cut = sentence_vectors(exported, [LINES[4], long, long + "z"], batch_tokens=70)
    assert cut == 2
    assert np.allclose(vectors[1], vectors[2], atol=1e-5)
    ids = exported.encoder.encode_batch([LINES[4]])[0]
    assert exported.tokenizer.special.mask not in ids, "a written [MASK] is six characters"


def test_the_nearest_lines_of_a_query_are_shown(run, tmp_path):
    (tmp_path / "lines.txt").write_text("".join(line + "\n" for line in LINES))
    done = run(embed, "--input", tmp_path / "lines.txt", "--query", LINES[3], "--top_k", 2)
    first, second = done.out.splitlines()
    assert first == f" 1.0000  line 4: {LINES[3]}"
    assert float(second.split()[0]) < 1
    unit = run(embed, "--input", tmp_path / "lines.txt", "--output", tmp_path / "unit.npy", "--normalize")
    assert unit.status == 0 and np.allclose(np.linalg.norm(np.load(tmp_path / "unit.npy"), axis=1), 1, atol=1e-6)
    assert np.array_equal(normalized(np.zeros((1, 3), dtype=np.float32)), np.zeros((1, 3)))
    assert run(embed, "--input", tmp_path / "lines.txt").err == (
        "error: nothing to do: give --output FILE, --query TEXT or both\n"
    )
    assert "is no file" in run(embed, "--input", tmp_path / "none", "--query", "x").err
