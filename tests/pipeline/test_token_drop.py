"""Layer-token drop: which tokens a layer sees, what becomes of the others, and that both follow from the step alone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig

from data_prep.errors import UserError
from data_prep.randomness import hash64
from pipeline import attention
from pipeline.model import auto_class
from pipeline.token_drop import install, kept_positions, kept_tokens

LAYERS, HEADS, WIDTH, VOCABULARY, LENGTH, KEPT = 4, 2, 16, 50, 24, 10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WINDOW = 3  # further tokens to a side that a sliding layer sees
BOUNDARIES = [
    0,
    9,
    15,
    LENGTH,
    LENGTH + 4,
    2 * LENGTH,
    3 * LENGTH - 1,
    3 * LENGTH,
]  # 3, 2 and 2 documents a row
MODELS = {
    "gpt2": ("causal", {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("causal", {**SIZES, "num_key_value_heads": 1}),
    "mistral": ("causal", {**SIZES, "num_key_value_heads": 1, "sliding_window": WINDOW + 1}),
    "bert": ("mlm", {**SIZES, **NO_DROPOUT}),
    "modernbert": ("mlm", {**SIZES, "local_attention": 2 * WINDOW,
                           "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}),
}  # fmt: skip


def make(model_type, **changes):
    objective, values = MODELS[model_type]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    return auto_class(objective).from_config(config, attn_implementation=attention.register()).train()


def stack_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)


def batch(rows=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)


def drawn(rows=3, kept=KEPT):
    return torch.from_numpy(kept_positions(hash64(7, np.arange(rows)), LAYERS - 2, LENGTH, kept))


def logits(model, ids, **arguments):
    return model(input_ids=ids, use_cache=False, **arguments).logits


def by_hand(model, number, hidden, positions):
    """One layer's output [batch, sequence, width], a sample at a time: the tokens at `positions` [batch, kept] with
    their own rotary angles and a mask from their own positions; the others as they came."""
    layer, model_type = stack_of(model)[number], model.config.model_type
    rows = []
    for row, places in zip(hidden, positions, strict=True):
        distance = places[None, :] - places[:, None]
        slides = model_type == "mistral" or getattr(layer, "attention_type", None) == "sliding_attention"
        seen = distance.abs() <= (WINDOW if slides else LENGTH)
        if MODELS[model_type][0] == "causal":
            seen &= distance <= 0
        arguments = {"attention_mask": seen[None, None]}
        if model_type in ("llama", "mistral"):
            arguments["position_embeddings"] = model.model.rotary_emb(hidden, places[None])
        if model_type == "modernbert":
            arguments["position_embeddings"] = model.model.rotary_emb(hidden, places[None], layer.attention_type)
        worked_on = type(layer).forward(layer, row[places][None], **arguments)[0]
        where = {int(place): index for index, place in enumerate(places)}
        rows.append(torch.stack([worked_on[where[i]] if i in where else row[i] for i in range(LENGTH)]))
    return torch.stack(rows)


def inputs_and_outputs(model, **arguments):
    """(hidden states that came in, hidden states that went out) of each layer."""
    seen = []
    hooks = [layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for layer in stack_of(model)]
    model(input_ids=batch(), use_cache=False, **arguments)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("model_type", MODELS)
def test_each_middle_layer_works_on_the_chosen_tokens_and_the_others_pass_by(model_type):
    model = make(model_type)
    install(model)
    kept = drawn()
    seen = inputs_and_outputs(model, kept_positions=kept)
    for number, (came_in, went_out) in enumerate(seen):
        everything = torch.arange(LENGTH).expand(3, -1)
        positions = kept[number - 1].long() if 0 < number < LAYERS - 1 else everything
        torch.testing.assert_close(went_out, by_hand(model, number, came_in, positions), rtol=1e-5, atol=1e-6)
        dropped = torch.ones(3, LENGTH, dtype=torch.bool).scatter(1, positions, False)
        assert torch.equal(went_out[dropped], came_in[dropped])
        assert (went_out != came_in).any(-1).sum() == positions.numel()


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_are_those_of_the_layers_by_hand(model_type):
    model = make(model_type)
    install(model)
    kept = drawn()
    weights = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))

    (inputs_and_outputs(model, kept_positions=kept)[-1][1] * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    hidden = inputs_and_outputs(model)[0][1]
    for number in range(1, LAYERS - 1):
        hidden = by_hand(model, number, hidden, kept[number - 1].long())
    (by_hand(model, LAYERS - 1, hidden, torch.arange(LENGTH).expand(3, -1)) * weights).sum().backward()

    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 4 * LAYERS
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_that_drops_nothing_is_bitwise_the_plain_one(model_type):
    plain = make(model_type)
    dropping = copy.deepcopy(plain)
    assert install(dropping) == LAYERS - 2
    expected = logits(plain, batch())
    assert torch.equal(logits(dropping, batch()), expected)
    assert torch.equal(logits(dropping, batch(), kept_positions=drawn(kept=LENGTH)), expected)
    assert not torch.equal(logits(dropping, batch(), kept_positions=drawn()), expected)
    assert torch.equal(logits(dropping.eval(), batch(), kept_positions=drawn()), expected), "evaluation sees all tokens"
    assert list(dropping.state_dict()) == list(plain.state_dict())


def test_a_copy_of_the_model_runs_its_own_layers():
    model = make("llama")
    install(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert logits(twin, batch(), kept_positions=drawn()).any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("model_type", MODELS)
def test_recomputed_activations_give_the_same_gradients(model_type):
    gradients = []
    for checkpointing in (False, True):
        model = make(model_type)
        install(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits(model, batch(), kept_positions=drawn()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def documents(model, boundaries=BOUNDARIES):
    boundaries = torch.tensor(boundaries, dtype=torch.int32)
    longest = int(boundaries.diff().max())
    return attention.document_arguments(boundaries, longest, (3, LENGTH), model.config, torch.float32)


@pytest.mark.parametrize("model_type", MODELS)
def test_documents_of_a_sample_do_not_see_each_other(model_type):
    model = make(model_type)
    install(model)
    before = logits(model, batch(), kept_positions=drawn(), **documents(model))
    changed = batch()
    first, end = BOUNDARIES[1:3]
    changed[0, first:end] = (changed[0, first:end] + 1) % VOCABULARY
    after = logits(model, changed, kept_positions=drawn(), **documents(model))
    others = torch.ones(3, LENGTH, dtype=torch.bool)
    others[0, first:end] = False
    assert torch.equal(after[others], before[others])
    assert (after != before).any(-1).sum() == end - first


def varlen_by_hand(query, key, value, starts, key_starts, longest, _, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn a document at a time; query [tokens, heads, head size]."""
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32
    assert longest >= starts.diff().max() and starts[0] == 0 and starts[-1] == len(query)
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    outputs = []
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        distance = torch.arange(end - first) - torch.arange(end - first)[:, None]
        left, right = (LENGTH if reach < 0 else reach for reach in window_size)
        scores = torch.einsum("qhd,khd->hqk", query[first:end], key[first:end])
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill((distance < -left) | (distance > right), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[first:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("model_type", MODELS)
def test_boundaries_are_those_of_the_kept_tokens(model_type, monkeypatch):
    """varlen_attn gives what the masked kernel gives, with documents of which no token is kept; a window is one of
    original positions with either."""
    model = make(model_type)
    install(model)
    kept = drawn(kept=3)
    expected = logits(model, batch(), kept_positions=kept, **documents(model))
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: "varlen_attn")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    arguments = documents(model)
    assert arguments["attention_mask"].dtype == torch.int32
    found = logits(model, batch(), kept_positions=kept, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_flex_attentions_block_mask_becomes_one_of_the_kept_tokens(model_type, monkeypatch):
    model = make(model_type)
    install(model)
    layer, hidden = stack_of(model)[2], torch.randn(3, LENGTH, WIDTH)
    dense = documents(model)["attention_mask"]
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: "FlexAttention")
    blocks = documents(model)["attention_mask"]
    assert isinstance(blocks, BlockMask)
    found, expected = (layer(hidden, attention_mask=mask, kept_positions=drawn()) for mask in (blocks, dense))
    assert torch.equal(found, expected) and not torch.equal(found, layer(hidden, kept_positions=drawn()))


def test_a_samples_result_does_not_depend_on_the_batch_that_it_is_in():
    model = make("llama")
    install(model)
    together = logits(model, batch(), kept_positions=drawn())
    for row in range(3):
        alone = logits(model, batch()[row : row + 1], kept_positions=drawn()[:, row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


@given(keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), layers=st.integers(1, 4), data=st.data())
@settings(max_examples=30, deadline=None)
def test_positions_are_ascending_distinct_and_the_rows_own(keys, layers, data):
    sequence = data.draw(st.integers(1, 70))
    kept = data.draw(st.integers(1, sequence))
    keys = np.array(keys, dtype=np.uint64)
    positions = kept_positions(keys, layers, sequence, kept)
    assert positions.shape == (layers, len(keys), kept) and positions.dtype == np.int32
    assert (np.diff(positions, axis=-1) > 0).all() and positions.min() >= 0 and positions.max() < sequence
    for row, key in enumerate(keys):
        alone = kept_positions(np.array([key]), 1, sequence, kept)
        assert np.array_equal(alone[0, 0], positions[0, row]), "nor on how many layers drop"


def test_every_position_is_kept_equally_often_and_layers_draw_on_their_own():
    rows, sequence, kept = 4000, 16, 4
    first, second = kept_positions(hash64(np.arange(rows)), 2, sequence, kept)
    share = kept / sequence
    deviation = np.sqrt(rows * share * (1 - share))
    for chosen in (first, second):
        counts = np.bincount(chosen.ravel(), minlength=sequence)
        assert np.abs(counts - rows * share).max() < 5 * deviation
    # Positions that both layers keep: hypergeometric, mean kept**2 / sequence = 1.
    in_both = (first[:, :, None] == second[:, None, :]).sum((1, 2))
    variance = kept * share * (1 - share) * (sequence - kept) / (sequence - 1)
    assert abs(in_both.mean() - 1) < 5 * np.sqrt(variance / rows)


@given(
    seq_per_step=st.sampled_from([1, 8, 16, 64]),
    start=st.integers(1, 6),
    longer=st.integers(1, 700),
    require_steps=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_the_schedule_is_deepspeeds(seq_per_step, start, longer, require_steps):
    from deepspeed.runtime.data_pipeline.data_routing.scheduler import RandomLTDScheduler

    min_value, max_value = start * seq_per_step, start * seq_per_step + longer
    scheduler = RandomLTDScheduler(
        {
            "total_layer_num": LAYERS,
            "random_ltd_layer_num": LAYERS - 2,
            "global_batch_size": 1,
            "random_ltd_schedule": {
                "min_value": min_value,
                "max_value": max_value,
                "schedule_type": "fixed_linear",
                "schedule_config": {"require_steps": require_steps, "seq_per_step": seq_per_step},
            },
            "layer_token_lr_schedule": {"enabled": False},
        }
    )
    settings_ = {"min_value": min_value, "require_steps": require_steps, "seq_per_step": seq_per_step}
    found, expected = [], []
    for step in range(2 * require_steps + 2):
        scheduler.update_seq(step)
        expected.append(scheduler.get_current_seq())
        found.append(kept_tokens(step, max_value, **settings_))
    assert found == expected
    assert found[0] == min_value


def test_models_without_a_stack_of_layers_are_refused():
    albert = AutoConfig.for_model("albert", **SIZES, embedding_size=WIDTH)
    with pytest.raises(UserError, match=r"curriculum.token_drop: albert is not one stack of 4 layers"):
        install(auto_class("mlm").from_config(albert))
    falcon = AutoConfig.for_model("falcon", **SIZES)
    with pytest.raises(UserError, match=r"falcon is not one stack"):
        install(auto_class("causal").from_config(falcon))
    with pytest.raises(UserError, match="has 2 layers"):
        install(make("gpt2", num_hidden_layers=2))


def test_an_argument_that_cannot_be_cut_is_refused():
    model = make("llama")
    install(model)
    for name, value in (("relative_positions", torch.zeros(LENGTH, LENGTH)), ("past_key_values", object())):
        with pytest.raises(UserError, match=rf"layers take {name} .*leave curriculum.token_drop out"):
            stack_of(model)[1](torch.zeros(3, LENGTH, WIDTH), kept_positions=drawn(), **{name: value})
