"""Evaluation's numbers are those of transformers' own losses and of cases worked by hand."""

import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.plan import split_documents
from data_prep.shards import ShardSet
from pipeline import evaluate
from pipeline.exported import Exported, load_exported
from pipeline.tasks import language
from tests.made_models import made_model
from tests.made_tasks import BAD, FILLERS, GOOD, make_model


def no_bar(tokens):
    return lambda done: None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    base = tmp_path_factory.mktemp("evaluate")
    return {
        "long": made_model(base / "long", "causal", tiny_tokenizer, n_positions=1024),
        "gpt": make_model(base / "gpt", "gpt2", initializer_range=0.3),
        "bert": make_model(base / "bert", "bert", initializer_range=0.3),
    }


def run(capsys, *flags):
    """(status, what was printed, the error) of the command."""
    status = evaluate.main([str(flag) for flag in flags])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def plain_nats(exported, ids):
    """The sum of transformers' own loss over a document behind the end of one."""
    start = exported.tokenizer.special.end_of_document
    inputs = torch.tensor([[start, *ids.tolist()]])
    with torch.no_grad():
        return float(exported.model(input_ids=inputs, labels=inputs).loss) * len(ids)


def test_perplexity_of_shards_is_that_of_the_documents_which_training_holds_out(folders, tiny_shards, capsys):
    exported = load_exported(folders["long"], dtype="fp32")
    shards = ShardSet.open(tiny_shards)
    _, split = split_documents(shards, 0.05)
    documents = [
        np.array(shards.shard(index).document(document))
        for index in range(len(shards.names))
        for document in range(split.first_document[index], split.end_document[index])
    ]
    assert len(documents) == int(sum(shards.documents) * 0.05)
    nats, tokens = sum(plain_nats(exported, ids) for ids in documents), sum(map(len, documents))
    flags = ("--model", folders["long"], "--task", "perplexity", "--input", tiny_shards, "--validation_fraction", 0.05)
    status, out, _ = run(capsys, *flags, "--json")
    found = json.loads(out)["metrics"]
    assert status == 0 and (found["tokens"], found["documents"]) == (tokens, len(documents))
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    texts = [exported.encoder.decode(ids[:-1]) for ids in documents]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts))
    status, out, _ = run(capsys, *flags, "--max_documents", 1)
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == list(found)


def test_word_perplexity_divides_by_the_words_of_the_file(folders, tmp_path, capsys):
    exported = load_exported(folders["gpt"], dtype="fp32")
    text = "= film =\n\nthe film , a story @-@ of actor 's scene .\n"
    read = "= film =\nthe film, a story-of actor's scene .\n"  # only between spaces is a full stop apart
    assert language.detokenize_wikitext(text.replace("\n\n", "\n")) == read
    ids = exported.encoder.encode_batch([language.detokenize_wikitext(text)])[0]
    nats = plain_nats(exported, ids)
    (tmp_path / "wiki.txt").write_text(text)
    flags = ("--model", folders["gpt"], "--task", "wikitext", "--input", tmp_path / "wiki.txt", "--json")
    _, out, _ = run(capsys, *flags)
    found = json.loads(out)["metrics"]
    assert (found["words"], found["tokens"]) == (14, len(ids))
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / 14), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text))
    _, out, _ = run(capsys, *flags, "--no_detokenize")
    whole = exported.encoder.encode_batch([text])[0]
    assert json.loads(out)["metrics"]["word_perplexity"] == pytest.approx(
        math.exp(plain_nats(exported, whole) / 14), rel=1e-4
    )


@pytest.mark.parametrize(
    ("tokenised", "prose"),
    [
        ("the dogs ' bowl", "the dogs' bowl"),
        ("1 @,@ 000 @.@ 5 kg", "1,000.5 kg"),
        ("He said : yes ; no ! why ? so , end . Next", "He said: yes; no! why? so, end. Next"),
        ('( a b ) [ c ] " d e " { f }', '(a b) [c] "d e" {f}'),
        ("it 's 5 \N{DEGREE SIGN} C", "it's 5\N{DEGREE SIGN}C"),
        ("= = = Title = = =", "=== Title ==="),
    ],
)
def test_wikitext_is_detokenised(tokenised, prose):
    assert language.detokenize_wikitext(tokenised) == prose


class Bigrams(torch.nn.Module):
    """A causal model with transformers' surface that knows only the token before, from log-probabilities [v, v]."""

    def __init__(self, probabilities):
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())
        text = SimpleNamespace(vocab_size=len(probabilities), max_position_embeddings=64)
        self.config = SimpleNamespace(get_text_config=lambda: text, model_type="bigrams")
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids])


def bigrams(folder, follows):
    """An `Exported` of which word `follows` which with what probability; the rest is spread over the vocabulary."""
    info, encoder = load_tokenizer_info(folder), Encoder(folder)
    table = np.zeros((info.vocab_size, info.vocab_size))

    def id_of(word):
        return int(encoder.encode_batch([word])[0][0])

    for (before, after), probability in follows.items():
        table[id_of(before), id_of(after)] = probability
    free = table == 0
    rest = (1 - table.sum(1, keepdims=True)) / free.sum(1, keepdims=True)
    return Exported(folder, "causal", Bigrams(np.where(free, rest, table)), info, encoder)


def test_lambada_of_a_case_worked_by_hand(folders):
    """cat's stand-ins: after "the" comes film (0.6) or story (0.3); a word of two tokens needs both to be first."""
    exported = bigrams(folders["gpt"], {("the", "film"): 0.6, ("the", "story"): 0.3, ("film", "."): 0.5})
    texts = ["a very great actor was in the film", "and with the story", "in the film."]
    found = language.lambada(exported, texts, no_bar).metrics
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(-(math.log(0.6) + math.log(0.3) + math.log(0.6 * 0.5)) / 3))
    with pytest.raises(UserError, match="has a single word"):
        language.lambada(exported, ["film "], no_bar)


def write_pairs(folder):
    generator = random.Random(4)
    rows = [
        {
            "sentence_good": " ".join([*generator.choices(FILLERS, k=generator.randint(1, 6)), generator.choice(GOOD)]),
            "sentence_bad": " ".join([*generator.choices(FILLERS, k=generator.randint(1, 6)), generator.choice(BAD)]),
            "UID": f"part{index % 3}",
        }
        for index in range(30)
    ]
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps(row) for row in rows if row["UID"] == f"part{part}"]
        (folder / f"part{part}.jsonl").write_text("\n".join(lines) + "\n")
    return rows


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_minimal_pairs_are_compared_by_plain_transformers_scores(folders, kind, tmp_path, capsys):
    rows = write_pairs(tmp_path / "blimp")
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    exported = load_exported(folders[kind], dtype="fp32")
    model = exported.model

    def likelihood(text):
        if kind == "gpt":
            return -plain_nats(exported, exported.encoder.encode_batch([text])[0])
        ids = tokenizer(text)["input_ids"]
        total = 0.0
        for place in range(1, len(ids) - 1):
            masked = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
            with torch.no_grad():
                total += float(model(input_ids=torch.tensor([masked])).logits[0, place].log_softmax(-1)[ids[place]])
        return total

    right = {name: [] for name in ("part0", "part1", "part2")}
    for row in rows:
        right[row["UID"]].append(likelihood(row["sentence_good"]) > likelihood(row["sentence_bad"]))
    assert 0 < sum(map(sum, right.values())) < 30
    flags = ("--model", folders[kind], "--task", "minimal_pairs", "--input", tmp_path / "blimp")
    _, out, _ = run(capsys, *flags, "--json")
    found = json.loads(out)
    assert found["metrics"] == {"accuracy": sum(map(sum, right.values())) / 30, "pairs": 30}
    assert {name: part["accuracy"] for name, part in found["parts"].items()} == {
        name: sum(part) / 10 for name, part in right.items()
    }
    _, out, _ = run(capsys, *flags)
    assert out.splitlines()[-2].split() == ["all", "accuracy", f"{found['metrics']['accuracy']:.4f}"]


def test_mistakes_are_one_line(folders, tmp_path, tiny_shards, capsys, monkeypatch):
    gpt, bert = folders["gpt"], folders["bert"]
    (tmp_path / "empty.jsonl").write_text('{"txt": "a"}\n')

    def error(*flags):
        status, out, err = run(capsys, *flags)
        assert status == 1 and not out and len(err.splitlines()) == 1
        return err

    assert "--task is 'lambda'; did you mean lambada?" in error("--model", gpt, "--task", "lambda", "--input", tmp_path)
    assert "give them with --input" in error("--model", gpt, "--task", "lambada")
    assert "no such file or folder" in error("--model", gpt, "--task", "wikitext", "--input", tmp_path / "nowhere")
    assert "is a masked model" in error("--model", bert, "--task", "lambada", "--input", tmp_path / "empty.jsonl")
    wrong = error("--model", gpt, "--task", "lambada", "--input", tmp_path / "empty.jsonl")
    assert "line 1: expected an object with text" in wrong
    assert "made with tokenizer" in error("--model", gpt, "--task", "perplexity", "--input", tiny_shards)
    assert "is no Hugging Face model folder" in error("--model", tmp_path, "--task", "lambada")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "lm-eval is not installed; pip install '.[lm_eval]'" in error("--model", gpt, "--task", "lm_eval:piqa")
    assert "measures causal models" in error("--model", bert, "--task", "lm_eval:piqa")
