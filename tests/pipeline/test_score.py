"""`pipeline.score`: what it prints of lines and of n-best lists, as a user meets it."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline import score
from pipeline.score import Score, pick_best, score_lines
from tests.made_models import made_model

LINES = [
    "The teacher counts the first letter.",
    "",
    "x",
    "  every worker\tkeeps",
    "日本語 👍🏽",
    "[MASK] is text",
]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory, tiny_tokenizer):
    return made_model(tmp_path_factory.mktemp("gpt"), "causal", tiny_tokenizer)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_tokenizer):
    return made_model(tmp_path_factory.mktemp("bert"), "mlm", tiny_tokenizer)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(line + "\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = score.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def made_up(texts):
    """A scorer that can be followed by hand: -2 a word, the words being the tokens."""
    return [Score(-2.0 * len(text.split()), len(text.split()), len(text.encode())) for text in texts]


def test_each_line_has_transformers_own_likelihood_in_the_order_of_the_file(gpt, lines, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt), AutoTokenizer.from_pretrained(gpt)
    done = run("--model", gpt, "--input", lines, "--json")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["text"] for record in records] == LINES
    total = tokens = 0
    for record in records:
        ids = tokenizer(record["text"])["input_ids"]
        assert record["tokens"] == len(ids)
        if not ids:
            assert record["log_probability"] == 0 and record["perplexity"] is record["bits_per_byte"] is None
            continue
        row = torch.tensor([[tokenizer.eos_token_id, *ids]])
        with torch.no_grad():
            loss = model(input_ids=row, labels=row).loss.item()
        assert record["log_probability"] == pytest.approx(-loss * len(ids), rel=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        bits = loss * len(ids) / math.log(2)
        assert record["bits_per_byte"] == pytest.approx(bits / len(record["text"].encode()), rel=1e-5)
        total, tokens = total - loss * len(ids), tokens + len(ids)
    assert done.err.splitlines()[-1].startswith(f"6 lines, {tokens} tokens, log-probability {total:,.2f}, perplexity ")


def test_columns_are_tab_separated_and_the_end_of_a_document_may_count(gpt, lines, run, tmp_path):
    done = run("--model", gpt, "--input", lines, "--output", tmp_path / "scores.tsv")
    assert done.status == 0 and done.out == ""
    header, *rows = (tmp_path / "scores.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["log_probability", "tokens", "perplexity", "bits_per_byte", "text"]
    assert [row.split("\t", 4)[4] for row in rows] == LINES
    assert rows[1].split("\t")[:4] == ["0.000000", "0", "-", "-"]
    ended = run("--model", gpt, "--input", lines, "--end").out.splitlines()[1:]
    for without, with_end in zip(rows, ended, strict=True):
        assert int(with_end.split("\t")[1]) == int(without.split("\t")[1]) + 1
        assert float(with_end.split("\t")[0]) < float(without.split("\t")[0])


def test_a_bert_gives_pseudo_likelihoods(bert, lines, run):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    done = run("--model", bert, "--input", lines, "--json")
    record = json.loads(done.out.splitlines()[0])
    ids = tokenizer(LINES[0], add_special_tokens=False)["input_ids"]
    assert record["tokens"] == len(ids)
    expected = 0.0
    for token, target in enumerate(ids):
        row = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
        row[0, token + 1] = tokenizer.mask_token_id
        with torch.no_grad():
            expected += model(input_ids=row).logits[0, token + 1].log_softmax(-1)[target].item()
    assert record["log_probability"] == pytest.approx(expected, rel=1e-5)
    assert "pseudo-log-probability" in done.err


def test_the_best_hypothesis_is_the_one_worked_by_hand(tmp_path):
    path = tmp_path / "nbest.tsv"
    path.write_text("u1\ta b c\t-1\nu2\tlong long\t-9\nu1\ta b\t-2.5\nu2\tx\t-9.5\n")

    def best(weight, length_bonus):
        written: list[str] = []
        count, total = pick_best(str(path), made_up, written.append, weight, length_bonus, as_json=True)
        assert (count, total.log_probability, total.tokens) == (4, -16.0, 8)
        return [(record["id"], record["text"], record["total"]) for record in map(json.loads, written)]

    # external + weight x (-2 a word) + bonus a word
    assert best(0.0, 0.0) == [("u1", "a b c", -1.0), ("u2", "long long", -9.0)]
    assert best(1.0, 0.0) == [("u1", "a b", -6.5), ("u2", "x", -11.5)]
    assert best(1.0, 1.0) == [("u1", "a b c", -4.0), ("u2", "x", -10.5)]
    assert best(0.5, 3.0) == [("u1", "a b c", 5.0), ("u2", "long long", -5.0)]


def test_an_nbest_list_may_have_no_external_scores(tmp_path):
    path = tmp_path / "nbest.tsv"
    path.write_text("7\tone two\n7\tone\n")
    written: list[str] = []
    pick_best(str(path), made_up, written.append, 1.0, 0.0, as_json=False)
    assert written[1] == "7\t-2.000000\t-2.000000\t1\t-\tone\n"


def test_a_long_file_is_scored_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "_LINES_AT_ONCE", 3)
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{'word ' * (number % 5)}\n" for number in range(10)))
    seen: list[int] = []
    written: list[str] = []
    lines, total = score_lines(
        str(path), lambda texts: seen.append(len(texts)) or made_up(texts), written.append, as_json=True
    )
    assert seen == [3, 3, 3, 1] and lines == 10
    assert [json.loads(line)["tokens"] for line in written] == [number % 5 for number in range(10)]
    assert total.tokens == 20 and total.perplexity == pytest.approx(math.exp(2))


def test_standard_input_is_read(gpt, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one line\nno end")))
    assert [line.split("\t")[4] for line in run("--model", gpt, "--input", "-").out.splitlines()[1:]] == [
        "one line",
        "no end",
    ]


def test_mistakes_are_one_line(gpt, bert, lines, run, tmp_path):
    def error(*arguments):
        done = run(*arguments)
        assert done.status == 1 and done.out == "" and done.err.count("\n") == 1
        return done.err

    assert "is no Hugging Face model folder" in error("--model", tmp_path, "--input", lines)
    assert "is no file" in error("--model", gpt, "--input", tmp_path / "nowhere")
    assert "has no --end" in error("--model", bert, "--input", lines, "--end")
    assert "--batch_tokens is 0" in error("--model", gpt, "--input", lines, "--batch_tokens", 0)
    assert "the stride is 65, expected 1 to the model's 64" in error(
        "--model", gpt, "--input", lines, "--stride", 65, "--output", tmp_path / "none.tsv"
    )
    assert not (tmp_path / "none.tsv").exists()
    table = tmp_path / "table.tsv"
    for content, message in (
        ("a\n", "line 1: 1 tab-separated columns, expected 2 or 3"),
        ("a\tb\t1\na\tb\n", "line 2: 2 tab-separated columns, expected 3 as in line 1"),
        ("a\tb\tnone\n", "line 1: the external score is 'none', expected a number"),
    ):
        table.write_text(content)
        assert message in error("--model", gpt, "--input", table, "--nbest", "--output", tmp_path / "none.tsv")
    lines.write_bytes(b"fine\n\xff\n")
    done = run("--model", gpt, "--input", lines, "--json")
    assert done.status == 1 and "line 2: 'utf-8' codec" in done.err
