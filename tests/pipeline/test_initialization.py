"""Initial weights are distributed as the papers' are, parameter by parameter."""

import math

import pytest
import torch
from transformers import AutoConfig

from pipeline.model import build_model

TRUNCATED = 0.879626  # deviation of a standard normal distribution that is cut at 2
LAYERS, WIDTH = 3, 128
BERT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 256,
        "vocab_size": 2000, "max_position_embeddings": 128, "pad_token_id": 1, "embedding_size": WIDTH}  # fmt: skip


def weights_of(model_type, objective, pairs=False, **values):
    return dict(build_model(AutoConfig.for_model(model_type, **values), objective, 7, pairs=pairs).named_parameters())


def assert_vectors_are_plain(weights):
    for name, weight in weights.items():
        if weight.ndim == 1:
            norm = "norm" in name.lower() or ".ln_" in name
            assert torch.equal(weight, torch.full_like(weight, float(norm and name.endswith("weight")))), name


def close(found, expected, elements):
    """Within five deviations of what the estimate of so many elements scatters."""
    return abs(found / expected - 1) < 5 / math.sqrt(2 * elements)


def test_gpt2s_residual_projections_are_scaled_by_the_number_of_layers():
    weights = weights_of("gpt2", "causal", n_layer=LAYERS, n_embd=WIDTH, n_head=2, n_positions=64, vocab_size=2000)
    assert_vectors_are_plain(weights)
    scaled = [name for name, weight in weights.items() if weight.ndim == 2 and name.endswith("c_proj.weight")]
    assert len(scaled) == 2 * LAYERS
    for name, weight in weights.items():
        if weight.ndim == 2:
            expected = 0.02 / math.sqrt(2 * LAYERS) if name in scaled else 0.02
            assert close(weight.detach().std().item(), expected, weight.numel()), name
            assert weight.abs().max() > 2.5 * expected, name


@pytest.mark.parametrize(("model_type", "pairs"), [("bert", True), ("albert", True), ("electra", False)])
def test_googles_encoders_are_drawn_again_beyond_two_deviations(model_type, pairs):
    weights = weights_of(model_type, "mlm", pairs, **BERT)
    assert_vectors_are_plain(weights)
    for name, weight in weights.items():
        if weight.ndim == 2:
            assert weight.abs().max() <= 0.04, name
            assert weight.numel() < 1000 or close(weight.detach().std().item(), 0.02 * TRUNCATED, weight.numel()), name
    words = next(weight for name, weight in weights.items() if "word_embeddings" in name)
    assert words[1].any(), "the row of padding is drawn as the others"


def test_other_architectures_keep_transformers_initialization():
    config = AutoConfig.for_model("roberta", **BERT)
    from transformers import AutoModelForMaskedLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = AutoModelForMaskedLM.from_config(config).state_dict()
    ours = build_model(config, "mlm", 7).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
