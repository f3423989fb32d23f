"""A padded vocabulary is the same model: losses, gradients, ties, and the weights that leave it."""

import copy

import pytest
import torch
from torch.nn import functional

from pipeline.heads import LossHead, linear_cross_entropy
from pipeline.model import build_model
from pipeline.objective import losses
from pipeline.optimizer import make_optimizer
from pipeline.recipe import OptimizerSection
from pipeline.vocabulary import pad_vocabulary, strip_padding
from tests.pipeline.test_objective import CPU, VOCABULARY, batch_of, small_config, small_model

PADDED = 100  # of multiples of 25
TERMS = {"z_loss": 0.01, "label_smoothing": 0.1}
MODELS = [("gpt2", "causal"), ("llama", "causal"), ("bert", "mlm"), ("modernbert", "mlm"), ("albert", "mlm"),
          ("granite", "causal")]  # fmt: skip


def padded_and_plain(model_type, objective):
    plain = small_model(model_type, objective)
    padded = copy.deepcopy(plain)
    pad_vocabulary(padded, 25)
    return padded, plain


def gradients_of(model, objective, vocabulary=None):
    found = losses(LossHead(model, CPU, vocabulary=vocabulary, **TERMS), batch_of(objective), torch.float32, 0.3)
    found.trained.backward()
    return found, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("model_type", "objective"), MODELS)
def test_padding_changes_neither_losses_nor_gradients_and_its_rows_have_none(model_type, objective):
    """Granite scales its logits, so they leave the fused path."""
    padded, plain = padded_and_plain(model_type, objective)
    assert padded.get_input_embeddings().weight.shape[0] == padded.get_output_embeddings().out_features == PADDED
    ours, of_padded = gradients_of(padded, objective, VOCABULARY)
    theirs, of_plain = gradients_of(plain, objective)
    torch.testing.assert_close(ours.of_tokens, theirs.of_tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.trained, theirs.trained, rtol=1e-6, atol=0)
    assert list(of_padded) == list(of_plain)
    for name, gradient in of_plain.items():
        if gradient is None:
            continue
        padding = of_padded[name][len(gradient) :]
        assert not padding.any()
        torch.testing.assert_close(of_padded[name][: len(gradient)], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("model_type", "objective"), MODELS)
def test_what_is_stripped_is_the_model_bit_by_bit(model_type, objective):
    padded, plain = padded_and_plain(model_type, objective)
    ties = {name: parameter.data_ptr() for name, parameter in padded.named_parameters(remove_duplicate=False)}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        for other, second in plain.named_parameters(remove_duplicate=False):
            assert (parameter is second) == (ties[name] == ties[other])
    stripped = strip_padding(padded.state_dict(), plain.state_dict())
    assert all(torch.equal(stripped[name], weight) for name, weight in plain.state_dict().items())
    assert padded.config.vocab_size == PADDED and plain.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("optimizer", ["AdamW", "Lamb", "Lion", "Muon"])
def test_no_optimizer_moves_the_rows_of_padding(optimizer):
    model = padded_and_plain("gpt2", "causal")[0]
    section = OptimizerSection(type=optimizer, lr=0.1, weight_decay=0.1)
    rule = make_optimizer(model, section, {})
    for group in rule.param_groups:
        group["lr"] = 0.1
    before = model.transformer.wte.weight.clone()
    for _ in range(3):
        gradients_of(model, "causal", VOCABULARY)
        rule.step()
        rule.zero_grad()
    moved = (model.transformer.wte.weight != before).any(1)
    assert moved[:VOCABULARY].all() and not model.transformer.wte.weight[VOCABULARY:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_padding_are_left_out_whatever_they_are(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(40, 8, generator=generator)
    hidden, weight = hidden.to(dtype), torch.cat([weight, 100 * torch.ones(8, 8)]).to(dtype).requires_grad_()
    ids = torch.randint(40, (20,), generator=generator)
    total, of_tokens, _ = linear_cross_entropy(hidden, weight, None, ids, vocabulary=40, rows=7, **TERMS)
    expected = functional.cross_entropy((hidden @ weight[:40].detach().t()).float(), ids, reduction="none")
    torch.testing.assert_close(of_tokens, expected)
    total.backward()
    assert not weight.grad[40:].any() and weight.grad[:40].any(1).all()


def test_models_with_a_bias_of_their_own_stay_as_they_are():
    """ESM's head adds one to what its projection gives."""
    config = small_config("esm", vocab_size=VOCABULARY)
    model = build_model(config, "mlm", 1)
    before = {name: weight.shape for name, weight in model.state_dict().items()}
    pad_vocabulary(model, 25)
    assert {name: weight.shape for name, weight in model.state_dict().items()} == before
    assert model.config.vocab_size == VOCABULARY


def test_a_multiple_needs_no_padding_and_a_meta_model_gets_it():
    model = small_model("gpt2", "causal")
    before = model.transformer.wte.weight
    pad_vocabulary(model, 32)
    assert model.transformer.wte.weight is before
    with torch.device("meta"):
        model = small_model("bert", "mlm")
    pad_vocabulary(model, 64)
    assert model.cls.predictions.decoder.weight.shape[0] == model.cls.predictions.bias.shape[0] == 128
