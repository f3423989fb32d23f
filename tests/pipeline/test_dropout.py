"""Dropout on CPUs drops as often as it says and independently, and attention with it is attention under that mask."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from pipeline import attention, dropout

SHAPE = BATCH, HEADS, LENGTH, SIZE = 2, 3, 150, 16  # more than one block of queries, and none that is full at the end
DTYPES = [torch.float32, torch.bfloat16]


def dropped_share(kept: torch.Tensor, rate: float) -> float:
    """Standard deviations between the share that was dropped and the rate."""
    number = kept.numel()
    return abs(float((~kept).sum()) - rate * number) / math.sqrt(number * rate * (1 - rate))


def assert_independent(kept: torch.Tensor, rate: float) -> None:
    """Each bit and its neighbours, near and far, are dropped together as often as chance has it."""
    flat = kept.flatten()
    for distance in (1, 2, 3, 8, 16, 64, 150, 1024, 22_500):
        together = ~flat[distance:] & ~flat[:-distance]
        assert dropped_share(~together, rate**2) < 4.5, distance


def visibility(kind: str) -> torch.Tensor | None:
    """[batch or 1, 1, sequence, sequence]"""
    if kind == "all":
        return None
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if kind == "causal":
        return causal[None, None]
    documents = torch.stack([torch.arange(LENGTH) // 40, (torch.arange(LENGTH) + 7) // 61])
    seen = documents[:, None, :, None] == documents[:, None, None, :]
    seen[1, 0, 5] = False  # a query that sees no key
    return seen


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value as models have them, [batch, heads, sequence, size] in other strides."""
    generator = torch.Generator().manual_seed(3)
    made = (torch.randn(BATCH, LENGTH, HEADS, SIZE, generator=generator) for _ in range(3))
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def kept_probabilities(visible: torch.Tensor | None, rate: float, seed: int) -> torch.Tensor:
    """What attention under a seed keeps, bool [batch, heads, sequence, sequence]: with the identity for values, its
    output is the probabilities after dropout."""
    torch.manual_seed(seed)
    same = torch.zeros(BATCH, HEADS, LENGTH, LENGTH)
    output = dropout.attention(same, same, torch.eye(LENGTH).expand_as(same).contiguous(), visible, 1.0, rate)
    return output.transpose(1, 2) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_dropped_at_the_rate_and_independently_and_the_rest_is_scaled(dtype, rate):
    values = torch.randn(301, 1000, dtype=dtype).requires_grad_()  # ends within a block of 1,024
    torch.manual_seed(1)
    output = dropout.dropout(values, rate)
    kept = output != 0
    assert dropped_share(kept, rate) < 4.5
    assert_independent(kept, rate)
    torch.testing.assert_close(output[kept], (values.float() / (1 - rate)).to(dtype)[kept])
    (gradient,) = torch.autograd.grad(output, values, torch.ones_like(output))
    assert torch.equal(gradient != 0, kept)
    other = dropout.dropout(values, rate) != 0
    assert dropped_share(kept | other, rate**2) < 4.5
    torch.manual_seed(1)
    assert torch.equal(dropout.dropout(values, rate), output)


@pytest.mark.parametrize("kind", ["all", "documents"])
def test_probabilities_are_dropped_at_the_rate_and_independently(kind):
    visible, rate = visibility(kind), 0.1
    kept = kept_probabilities(visible, rate, 1)
    other = kept_probabilities(visible, rate, 2)
    if visible is None:
        assert_independent(kept, rate)
        assert_independent(kept.transpose(2, 3), rate)
        visible = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    seen = visible.expand(BATCH, HEADS, -1, -1)
    assert not kept[~seen].any()
    assert dropped_share(kept[seen], rate) < 4.5
    assert dropped_share((kept | other)[seen], rate**2) < 4.5


@pytest.mark.parametrize("kind", ["all", "causal", "documents"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_its_gradients_are_those_of_plain_attention_under_the_same_mask(dtype, kind):
    visible, rate, factor = visibility(kind), 0.2, 0.3
    kept = kept_probabilities(visible, rate, 5)
    inputs, exact = tensors(dtype), [tensor.detach().double().requires_grad_() for tensor in tensors(dtype)]
    torch.manual_seed(5)
    output = dropout.attention(*inputs, visible, factor, rate)
    scores = exact[0] @ exact[1].transpose(2, 3) * factor
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    shares = torch.softmax(scores, -1).nan_to_num(0.0)
    expected = ((shares * kept / (1 - rate)) @ exact[2]).transpose(1, 2)
    outward = torch.randn(expected.shape, dtype=torch.float64)
    found = (output, *torch.autograd.grad(output, inputs, outward.to(dtype)))
    wanted = (expected, *torch.autograd.grad(expected, exact, outward.to(dtype).double()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        # What rounding inputs to bfloat16 and back changes by, twice, or float32's of sums.
        assert (ours - theirs).norm() <= (8e-3 if dtype == torch.bfloat16 else 2e-6) * theirs.norm()


def repeated(arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.expand(100, *tensor.shape[1:]) for name, tensor in arguments.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_is_no_number_is_none_in_output_and_gradients(dtype, value):
    """A run that diverges has to see it."""
    query, key, other = tensors(dtype)
    with torch.no_grad():
        query[0, 1, 7, 3] = value
    output = dropout.attention(query, key, other, visibility("causal"), 0.3, 0.1)
    of_key = torch.autograd.grad(output.sum(), key)[0]
    assert output[0, 7, 1].isnan().all() and of_key[0, 1, :8].isnan().any()
    sound = torch.ones(BATCH, LENGTH, HEADS, dtype=torch.bool)
    sound[0, 7, 1] = False
    assert output[sound].isfinite().all()


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_a_models_attention_takes_the_place_of_sdpas_math_and_keeps_its_average(model_type, monkeypatch):
    """The mean of many draws is the output without dropout, with and without documents, with shared key heads."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    dropouts = {
        "gpt2": {"attn_pdrop": 0.3, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0},
        "llama": {"attention_dropout": 0.3, "num_key_value_heads": 2},
    }[model_type]
    config = AutoConfig.for_model(model_type, **sizes, intermediate_size=64, max_position_embeddings=64, **dropouts)
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention.register()).train()
    calls, ours = [], dropout.attention
    monkeypatch.setattr(dropout, "attention", lambda *arguments: calls.append(arguments) or ours(*arguments))
    ids = torch.arange(24)[None] % 40
    seen = {}
    layer = next(module for name, module in model.named_modules() if name.endswith(("attn", "attention.self")))
    layer.register_forward_hook(lambda *call: seen.update(output=call[-1][0].detach()))
    for boundaries in (None, torch.tensor([0, 9, 24], dtype=torch.int32)):
        arguments = attention.document_arguments(boundaries, 15, (1, 24), config, torch.float32)
        calls.clear()
        with torch.no_grad():
            model.eval()(input_ids=ids, **arguments)
            expected = seen["output"]
            assert not calls
            model.train()(input_ids=ids.expand(100, -1), **repeated(arguments))
        assert len(calls) == 1
        error = (seen["output"] - expected).square().mean((1, 2)).mean().sqrt()
        mean_error = (seen["output"].mean(0) - expected[0]).square().mean().sqrt()
        assert 0.6 < mean_error * 10 / error < 1.5  # 100 draws: a tenth of the error of one


def test_modules_of_a_model_drop_in_training_alone_and_keep_their_names():
    config = AutoConfig.for_model("bert", vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.hidden_dropout_prob = 0.5
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
    plain, names, ids = copy.deepcopy(model).eval(), list(model.state_dict()), torch.arange(24)[None]
    dropout.use_in(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert model.config._attn_implementation == attention.IMPLEMENTATION
    inner = model.train().bert.encoder.layer[0].output.dropout
    assert isinstance(inner, nn.Dropout) and inner.p == 0.5
    values = torch.randn(40, 50)
    for seed, of_values in ((1, values), (1, values.bfloat16())):
        torch.manual_seed(seed)
        found = inner(of_values)
        torch.manual_seed(seed)
        assert torch.equal(found, dropout.dropout(of_values, 0.5))
    doubles = inner(values.double())  # torch's own
    assert dropped_share(doubles != 0, 0.5) < 4.5


def test_what_is_dropped_does_not_depend_on_the_number_of_threads():
    values, found = torch.ones(3000, 7), []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        torch.manual_seed(1)
        found.append(dropout.dropout(values, 0.3))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_compiled_model_drops_the_same():
    query, key, value = tensors(torch.float32)

    def outputs() -> torch.Tensor:
        return dropout.dropout(dropout.attention(query, key, value, visibility("causal"), 0.25, 0.1), 0.1)

    found = []
    for function in (outputs, torch.compile(outputs, backend="aot_eager")):
        torch.manual_seed(1)
        output = function()
        found.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)
