"""Likelihoods are those of transformers' own losses and of cases worked by hand, whatever the batches and windows."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from data_prep.encoding import SpecialTokens
from data_prep.errors import UserError
from pipeline.likelihood import pseudo_log_likelihood, target_scores, token_log_probabilities, windows

VOCABULARY, POSITIONS, START = 60, 24, 3
SPECIAL = SpecialTokens(end_of_document=3, padding=1, classification=4, separator=5, mask=6, unknown=0)
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": POSITIONS, "pad_token_id": 1,
    "bos_token_id": 3, "eos_token_id": 3, "initializer_range": 0.3,
}  # fmt: skip


class Bigrams(torch.nn.Module):
    """A causal model with transformers' surface that knows only the token before: counts of (before, after) + 1."""

    def __init__(self, counts):
        super().__init__()
        self.register_buffer("logits", (torch.tensor(counts, dtype=torch.float32) + 1).log())
        text = SimpleNamespace(vocab_size=len(counts), max_position_embeddings=8)
        self.config = SimpleNamespace(get_text_config=lambda: text, model_type="bigrams")
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids])


def model_of(auto, model_type, **changes):
    torch.manual_seed(1)
    return auto.from_config(AutoConfig.for_model(model_type, **SMALL, **changes)).eval()


def sequences_of(*lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(7, VOCABULARY, length) for length in lengths]


def test_a_bigram_models_probabilities_are_the_ones_worked_by_hand():
    # Id 0 ends a document; counts of what follows it, of what follows 1, of what follows 2.
    model = Bigrams([[0, 3, 1], [2, 0, 4], [6, 0, 0]])
    (one, none, long) = token_log_probabilities(model, [[1, 2, 0], [], [1, 2] * 9], start=0)
    # Of (3 + 1) / 7, (4 + 1) / 9 and (6 + 1) / 9.
    assert one.log_probabilities == pytest.approx([math.log(4 / 7), math.log(5 / 9), math.log(7 / 9)], rel=1e-6)
    assert one.ranks.tolist() == [0, 0, 0]
    assert none.log_probabilities.shape == (0,)
    # Only the token before counts, so windows of 8 positions change nothing.
    expected = [math.log(4 / 7), math.log(5 / 9)] + [math.log(1 / 9), math.log(5 / 9)] * 8
    assert long.log_probabilities == pytest.approx(expected, rel=1e-6)
    assert long.ranks.tolist() == [0, 0] + [1, 0] * 8


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_the_sum_is_transformers_own_loss_in_any_batch(model_type, batch_tokens):
    model = model_of(AutoModelForCausalLM, model_type)
    sequences = sequences_of(5, 1, 24, 24, 0, 13)
    scored: list[int] = []
    scores = token_log_probabilities(model, sequences, START, batch_tokens=batch_tokens, done=scored.append)
    assert sum(scored) == sum(map(len, sequences))
    for ids, score in zip(sequences, scores, strict=True):
        assert len(score.log_probabilities) == len(ids)
        if len(ids) and len(ids) < POSITIONS:
            row = torch.tensor([[START, *ids]])
            with torch.no_grad():
                output = model(input_ids=row, labels=row)
            assert -score.log_probabilities.mean() == pytest.approx(output.loss.item(), rel=1e-5)
            best = output.logits[0, :-1].argmax(-1).numpy()
            assert np.array_equal(score.ranks == 0, best == ids)


def test_a_long_sequence_has_the_scores_of_its_windows():
    model = model_of(AutoModelForCausalLM, "gpt2")
    (ids,) = sequences_of(3 * POSITIONS + 5)
    (scores,) = token_log_probabilities(model, [ids], START, stride=10)
    inputs = torch.tensor([START, *ids])
    with torch.no_grad():
        for token in (0, 23, 24, 33, 34, len(ids) - 1):
            # The window of a token begins 0, 10, 20, ... tokens in, as late as it must for the token to be within it.
            begin = 0 if token < POSITIONS else 10 * (-(-(token - POSITIONS + 1) // 10))
            logits = model(input_ids=inputs[None, begin : token + 1]).logits[0, -1]
            expected = logits.log_softmax(-1)[ids[token]].item()
            assert scores.log_probabilities[token] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="the stride is 25, expected 1 to the model's 24 positions"):
        token_log_probabilities(model, [ids], START, stride=25)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_count_every_token_once_with_the_context_that_the_stride_leaves(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    found = windows(tokens, length, stride)
    assert [token for window in found for token in range(window.scored, window.end)] == list(range(tokens))
    for window in found:
        assert window.end - window.begin <= length and window.begin <= window.scored
        assert window.begin == 0 or window.scored - window.begin >= length - stride


@given(st.integers(0, 9), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_a_whole_log_softmax(rows, vocabulary):
    generator = torch.Generator().manual_seed(rows * 100 + vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator).bfloat16()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    found, ranks = target_scores(logits, targets)
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for row, target, rank in zip(logits.tolist(), targets.tolist(), ranks.tolist(), strict=True):
        assert rank == sum(other > row[target] for other in row)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_pseudo_likelihood_masks_each_token_alone(model_type, batch_tokens):
    changes = {"embedding_size": 24} if model_type == "albert" else {}
    model = model_of(AutoModelForMaskedLM, model_type, **changes)
    sequences = sequences_of(4, 1, 0, 9, 20)
    scores = pseudo_log_likelihood(model, sequences, SPECIAL, batch_tokens=batch_tokens)
    for ids, score in zip(sequences, scores, strict=True):
        assert len(score) == len(ids)
        for token, found in enumerate(score):
            row = torch.tensor([[4, *ids, 5]])
            labels = torch.full_like(row, -100)
            labels[0, token + 1], row[0, token + 1] = int(ids[token]), 6
            with torch.no_grad():
                expected = -model(input_ids=row, labels=labels).loss.item()
            assert found == pytest.approx(expected, abs=1e-5)


def test_pseudo_likelihood_of_a_long_sequence_sees_the_stretch_around_each_token():
    model = model_of(AutoModelForMaskedLM, "bert")
    (ids,) = sequences_of(60)
    (scores,) = pseudo_log_likelihood(model, [ids], SPECIAL)
    for token, begin in ((0, 0), (11, 0), (12, 1), (30, 19), (50, 38), (59, 38)):
        row = torch.tensor([[4, *ids[begin : begin + 22], 5]])
        row[0, 1 + token - begin] = 6
        with torch.no_grad():
            expected = model(input_ids=row).logits[0, 1 + token - begin].log_softmax(-1)[ids[token]].item()
        assert scores[token] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="no mask_token"):
        pseudo_log_likelihood(model, [ids], SpecialTokens(3, 1, 4, 5, None, 0))
