"""`pipeline.generate`: transformers' texts, the same in batches, in streams and one by one."""

import builtins
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline import generate
from pipeline.exported import load_exported
from pipeline.generate import Settings, Streamer, TextReader, _byte_ids, continuations
from tests.made_models import made_model

PROMPTS = ["The teacher counts", "", "x", "every worker keeps a list of names in order " * 2, "日本語 👍🏽"]
GREEDY = Settings(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return made_model(tmp_path_factory.mktemp("gpt"), "causal", tiny_tokenizer)


@pytest.fixture(scope="module")
def gpt(folder):
    return load_exported(folder, "causal")


@pytest.fixture
def run(folder, capsys):
    def run(*arguments):
        status = generate.main(["--model", str(folder), *map(str, arguments)])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def texts_of(gpt, prompts, chosen):
    found = dict(continuations(gpt, prompts, chosen))
    return [found[number] for number in range(len(prompts))]


def test_a_greedy_text_is_transformers_own(gpt):
    (found,) = texts_of(gpt, PROMPTS[:1], GREEDY)[0]
    ids = [gpt.tokenizer.special.end_of_document, *gpt.encoder.encode_batch(PROMPTS[:1])[0].tolist()]
    made = gpt.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=1)[0].tolist()
    assert PROMPTS[0] + found.text == gpt.encoder.decode(made[1:]).removesuffix("<|endoftext|>")
    assert found.tokens <= 12


def test_prompts_together_have_the_texts_that_they_have_alone(gpt):
    alone = [texts_of(gpt, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len({found.text for (found,) in alone}) > 2
    for batch_size in (1, 3, 16):
        together = Settings(temperature=0, max_new_tokens=12, batch_size=batch_size)
        assert texts_of(gpt, PROMPTS, together) == alone


def test_a_prompt_near_the_end_of_the_positions_does_not_shorten_the_others(gpt):
    long = "x" * 60
    tokens = len(gpt.encoder.encode_batch([long])[0])
    assert 54 < tokens < 63
    chosen = Settings(temperature=0, max_new_tokens=20)
    (near,), (short,) = texts_of(gpt, [long, "The teacher"], chosen)
    assert near.tokens == 64 - tokens - 1 and near.finish == "length"
    assert [short] == texts_of(gpt, ["The teacher"], chosen)[0]
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens with the start of the document, the model 64 pos"):
        texts_of(gpt, ["x", long * 3], chosen)


def test_a_text_ends_before_a_stop_string_in_any_batch(gpt):
    plain = [found.text for (found,) in texts_of(gpt, PROMPTS, GREEDY)]
    stops = tuple({text[3:5] for text in plain if len(text) > 5})
    chosen = Settings(temperature=0, max_new_tokens=12, stop=stops)
    for text, (found,) in zip(plain, texts_of(gpt, PROMPTS, chosen), strict=True):
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        assert found.text == (text[: min(ends)] if ends else text)
        assert found.finish == ("stop" if ends else "length")
        assert found.tokens <= 12


def test_samples_differ_and_the_seed_repeats_them(run):
    flags = ("--prompt", "x", "y", "--num_samples", 3, "--max_new_tokens", 8, "--json", "--temperature", 1)
    first, again, other = run(*flags), run(*flags), run(*flags, "--seed", 5)
    records = [json.loads(line) for line in first.out.splitlines()]
    assert [(record["prompt"], record["sample"]) for record in records] == [(p, s) for p in "xy" for s in range(3)]
    assert len({record["text"] for record in records}) == 6
    assert all(record["finish"] in ("length", "end") for record in records)
    assert first.out == again.out != other.out


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_adds_up_to_the_text(gpt, data):
    """Whatever the tokens, stop strings across them and bytes of characters among them."""
    ids = data.draw(st.lists(st.integers(0, gpt.tokenizer.vocab_size - 1), max_size=30))
    text = gpt.encoder.decode(ids)
    cuts = st.integers(0, max(0, len(text) - 1))
    stops = [text[at : at + size] for at, size in data.draw(st.lists(st.tuples(cuts, st.integers(1, 6)), max_size=2))]
    chosen = Settings(stop=tuple(stop for stop in stops if stop))
    reader = TextReader(gpt, [[gpt.tokenizer.special.end_of_document, 300, 301]], chosen)
    written: list[str] = []
    streamer = Streamer(reader, _byte_ids(gpt.folder), written.append)
    streamer.put(torch.tensor([[0]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(written) == reader.continuation(0, ids).text


def test_one_text_streams_and_equals_the_json(run):
    flags = ("--prompt", PROMPTS[4], "--temperature", 0, "--max_new_tokens", 10)
    shown, found = run(*flags), run(*flags, "--json")
    record = json.loads(found.out)
    assert shown.out == PROMPTS[4] + record["text"] + "\n"


def test_prompts_come_from_a_file(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The teacher counts\nx\n")
    done = run("--prompt_file", path, "--max_new_tokens", 3, "--temperature", 0)
    assert done.out.startswith("--- prompt 1, text 1\nThe teacher counts")
    assert "\n--- prompt 2, text 1\nx" in done.out


def test_prompts_come_from_a_terminal(run, monkeypatch):
    lines = iter(["The teacher", "", "x" * 300, "x"])

    def answer(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    done = run("--max_new_tokens", 3, "--temperature", 0)
    assert done.status == 0 and "error: prompt 1 has 3" in done.err
    assert done.out.startswith("The teacher") and "\nx" in done.out


def test_mistakes_are_one_line(run, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    def error(*arguments):
        done = run(*arguments)
        assert done.status == 1 and done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
        return done.err

    assert "--temperature is -1.0, expected 0 or more" in error("--prompt", "x", "--temperature", -1)
    assert "--top_p is 0.0, expected more than 0" in error("--prompt", "x", "--top_p", 0)
    assert "all would be the same" in error("--prompt", "x", "--temperature", 0, "--num_samples", 2)
    assert "the model 64 positions; shorten it" in error("--prompt", "x" * 300)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert "no prompt: give --prompt TEXT" in error()
    assert f"No such file or directory ({tmp_path / 'none'})" in error("--prompt_file", tmp_path / "none")
    bert = made_model(tmp_path / "bert", "mlm", tiny_tokenizer)
    capsys.readouterr()
    assert "holds BertForMaskedLM, expected a causal language model" in error("--prompt", "x", "--model", bert)
