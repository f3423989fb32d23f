"""Documents packed into one sample are as if each were alone: logits, gradients, positions, on every kernel."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

from data_prep.errors import UserError
from pipeline import attention

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROTARY = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
BERT = {**SIZES, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}
LAYERS = ["full_attention", "sliding_attention"]
WINDOW = 4
CAUSAL = {
    "gpt2": {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": ROTARY,
    "mistral": {**ROTARY, "sliding_window": WINDOW},
    "qwen3": {**ROTARY, "head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
}
MASKED = {
    "bert": BERT,
    "albert": {**BERT, "embedding_size": 16},
    "roberta": {**BERT, "pad_token_id": 3},
    "modernbert": {**ROTARY, "local_attention": 2 * WINDOW, "layer_types": LAYERS, "pad_token_id": 0},
}
TYPES = (*CAUSAL, *MASKED)
BOUNDARIES = (0, 7, 20, 24, 25, 48)
LENGTH = 24
FLOAT32 = 4e-6
"""Rounding of float32 in a network of this depth, relative to the largest value (the largest seen is 1e-6)."""


def make_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**CAUSAL, **MASKED}[model_type] | changes)


def make_model(model_type, implementation=attention.IMPLEMENTATION, **changes):
    """Weights ten times the usual ones, so that attention is far from an average over all tokens."""
    attention.register()
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForMaskedLM
    torch.manual_seed(1)
    model = auto.from_config(make_config(model_type, **changes), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def models():
    return {model_type: make_model(model_type) for model_type in TYPES}


def arguments(model, boundaries=BOUNDARIES, shape=(2, LENGTH), dtype=torch.float32):
    longest = max(end - start for start, end in itertools.pairwise(boundaries))
    return attention.document_arguments(
        torch.tensor(boundaries, dtype=torch.int32), longest, shape, model.config, dtype
    )


def logits(model, ids, **kwargs):
    """float [batch * sequence, vocabulary]"""
    if model.config.model_type in CAUSAL:
        kwargs["use_cache"] = False
    return model(input_ids=ids, **kwargs).logits.flatten(0, 1)


def random_ids(*shape, seed=0):
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))


def alone(model, ids, boundaries):
    """The logits of each document as a batch of its own, one behind the other."""
    stretches = itertools.pairwise(boundaries)
    return torch.cat([logits(model, ids.flatten()[None, start:end]) for start, end in stretches])


def assert_close(found, expected, tolerance=FLOAT32):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def packings(draw):
    """(boundaries, (batch, sequence)): rows cut anywhere."""
    batch, sequence = draw(st.integers(1, 3)), draw(st.integers(2, 30))
    cuts = draw(st.sets(st.integers(0, batch * sequence), max_size=8))
    return sorted(cuts | {row * sequence for row in range(batch + 1)}), (batch, sequence)


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=8, deadline=None)
@given(packing=packings(), seed=st.integers(0, 99))
def test_a_document_has_the_same_logits_alone_and_packed(models, model_type, packing, seed):
    boundaries, shape = packing
    model, ids = models[model_type], random_ids(*shape, seed=seed)
    with torch.no_grad():
        packed = logits(model, ids, **arguments(model, boundaries, shape))
        assert_close(packed, alone(model, ids, boundaries))


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_of_a_packed_batch_are_the_sum_of_its_documents(models, model_type):
    model, ids = models[model_type], random_ids(2, LENGTH)
    found = []
    for output in (logits(model, ids, **arguments(model)), alone(model, ids, BOUNDARIES)):
        loss = functional.cross_entropy(output, ids.flatten().roll(1), reduction="sum")
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    largest = max(gradient.abs().max() for gradient in found[1] if gradient is not None)
    for packed, separate in zip(*found, strict=True):
        if separate is not None:
            assert (packed - separate).abs().max() <= FLOAT32 * largest


@pytest.mark.parametrize("model_type", TYPES)
def test_a_token_changed_in_one_document_changes_no_bit_of_the_others(models, model_type):
    model, ids = models[model_type], random_ids(2, LENGTH)
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] - 4) % 55 + 5
    with torch.no_grad():
        before, after = (logits(model, tokens, **arguments(model)) for tokens in (ids, changed))
    same = (before == after).all(1)
    assert same[:7].all() and same[20:].all() and not same[10]


def test_positions_restart_in_every_document(models):
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    found = {name: arguments(model, (0, 3, 5, 6, 7, 12), (2, 6))["position_ids"] for name, model in models.items()}
    roberta = found.pop("roberta")
    assert all(positions.tolist() == expected for positions in found.values())
    assert (roberta - 4).tolist() == expected  # padding_idx 3: the first position is 4


def test_every_type_whose_positions_begin_behind_the_padding_is_known():
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    marked = {path.parent.name for path in sources if "create_position_ids_from_input_ids" in path.read_text()}
    found = set()
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING):
        for config_class in mapping:
            if config_class.__module__.split(".")[2] in marked:
                try:
                    attention.check_supported(config_class())
                except UserError:
                    continue
                found.add(config_class.model_type)
    assert found == attention._POSITIONS_BEHIND_PADDING


@pytest.mark.parametrize("model_type", TYPES)
def test_a_padded_tail_gives_no_nan_and_does_not_matter(models, model_type):
    model, ids = models[model_type], random_ids(1, LENGTH)
    ids[0, 9:] = model.config.pad_token_id or 0
    with torch.no_grad():
        packed = logits(model, ids, **arguments(model, (0, 9, LENGTH), (1, LENGTH)))
        assert packed.isfinite().all()
        assert_close(packed[:9], logits(model, ids[:, :9]))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_batch_without_boundaries_is_bitwise_sdpa(models, model_type):
    model, plain, ids = models[model_type], make_model(model_type, "sdpa"), random_ids(2, LENGTH)
    plain.load_state_dict(model.state_dict())
    none = attention.document_arguments(None, LENGTH, (2, LENGTH), model.config, torch.float32)
    one_a_row = arguments(model, (0, LENGTH, 2 * LENGTH))
    with torch.no_grad():
        expected = logits(plain, ids)
        assert torch.equal(logits(model, ids, **none), expected)
        assert torch.equal(logits(model, ids, **one_a_row), expected)


def test_dropout_in_attention_stays_and_keeps_documents_apart():
    model = make_model("bert", attention_probs_dropout_prob=0.5).train()
    ids = random_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, 0] = 5

    def run(tokens, seed):
        torch.manual_seed(seed)
        return logits(model, tokens, **arguments(model))

    with torch.no_grad():
        first, other_seed, other_tokens = run(ids, 1), run(ids, 2), run(changed, 1)
    assert not torch.equal(first[7:24], other_seed[7:24])
    assert torch.equal(first[7:24], other_tokens[7:24])


@pytest.mark.parametrize("model_type", ["gpt2", "modernbert"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    model, ids, found = make_model(model_type).train(), random_ids(2, LENGTH), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        logits(model, ids, **arguments(model)).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*found, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "modernbert"])
def test_a_compiled_model_gives_the_same_logits_in_one_graph(models, model_type):
    model, ids = models[model_type], random_ids(2, LENGTH)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = logits(model, ids, **arguments(model))
        kwargs = {"use_cache": False} if model_type in CAUSAL else {}
        found = compiled(input_ids=ids, **arguments(model), **kwargs).logits.flatten(0, 1)
    assert_close(found, expected)


# What a GPU does, with stand-ins for its kernels.


def varlen_by_its_documentation(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """torch.nn.attention.varlen.varlen_attn as its documentation has it, a document at a time."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q.is_contiguous() and torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.ndim == 1 and query.ndim == key.ndim == value.ndim == 3
    lengths = cu_seq_q.diff().tolist()
    assert max(lengths) == max_q == max_k and sum(lengths) == len(query) == len(key)
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = (LENGTH if side == -1 else side for side in window_size)
    outputs = []
    for queries, keys, values in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        tokens = torch.arange(len(queries))
        distance = tokens - tokens[:, None]  # of a key to the right of a query
        output = functional.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in (queries, keys, values)),
            attn_mask=(distance >= -left) & (distance <= right),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("model_type", TYPES)
def test_varlen_attn_gets_what_its_documentation_asks_for(models, model_type, monkeypatch):
    from torch.nn.attention import varlen

    model, ids = models[model_type], random_ids(2, LENGTH)
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: "varlen_attn")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_its_documentation)
    made = arguments(model)
    assert made["attention_mask"].shape == (1, 1, 1, len(BOUNDARIES)) and made["longest_document"] == 23
    with torch.no_grad():
        assert_close(logits(model, ids, **made), alone(model, ids, BOUNDARIES))


def test_varlen_attn_is_refused_for_scores_that_it_cannot_compute(models):
    heads = torch.zeros(1, 2, 4, 8)
    boundaries = torch.tensor([0, 1, 4], dtype=torch.int32).view(1, 1, 1, -1)
    with pytest.raises(UserError, match=r"softcap.*data\.document_attention"):
        attention.document_attention(models["llama"], heads, heads, heads, boundaries, softcap=30.0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "bert", "modernbert"])
def test_flex_attention_uncompiled_gives_the_logits_of_sdpa(models, model_type, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def uncompiled(module, query, key, value, block_mask, scaling=None, **_):
        output = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    model, ids = models[model_type], random_ids(2, LENGTH)
    with torch.no_grad():
        expected = logits(model, ids, **arguments(model))
        monkeypatch.setattr(attention, "choose_kernel", lambda *_: "FlexAttention")
        monkeypatch.setattr(integration, "flex_attention_forward", uncompiled)
        assert_close(logits(model, ids, **arguments(model)), expected)


@pytest.mark.parametrize(
    ("capability", "dtype", "changes", "expected"),
    [
        ((9, 0), torch.bfloat16, {}, "varlen_attn"),
        ((8, 0), torch.float16, {}, "varlen_attn"),
        ((7, 5), torch.float16, {}, "FlexAttention"),
        ((9, 0), torch.float32, {}, "FlexAttention"),
        ((9, 0), torch.bfloat16, {"head_dim": 256}, "FlexAttention"),
        ((9, 0), torch.bfloat16, {"head_dim": 12}, "SDPA"),
        ((9, 0), torch.bfloat16, {"attention_dropout": 0.1}, "SDPA"),
    ],
)
def test_the_kernel_follows_the_gpu_the_dtype_the_head_size_and_dropout(
    capability, dtype, changes, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    config, device = make_config("llama", **{"head_dim": 16} | changes), torch.device("cuda")
    assert attention.choose_kernel(device, dtype, config) == expected
    assert attention.choose_kernel(torch.device("cpu"), dtype, config) == "SDPA"
    assert attention.describe(device, dtype, config).startswith(f"document attention by {expected}")
    assert ("dropout is 0.1" in attention.describe(device, dtype, config)) == ("attention_dropout" in changes)


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gptj", {}, "attention interface"),
        ("mamba", {}, "attention interface"),
        ("mobilebert", {}, "outside of attention's mask"),
        ("lfm2", {"num_hidden_layers": 1, "layer_types": ["conv"]}, "layers of type conv"),
    ],
)
def test_an_architecture_that_cannot_keep_documents_apart_is_refused(model_type, changes, reason):
    with pytest.raises(UserError, match=f"{model_type} model.*{reason}.*set data.document_attention to false"):
        attention.check_supported(AutoConfig.for_model(model_type, **changes))


def test_the_tested_architectures_are_supported():
    for model_type in TYPES:
        attention.check_supported(make_config(model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_whose_documents_see_each_other_is_found_before_a_run(models, model_type, monkeypatch):
    model, cpu = models[model_type], torch.device("cpu")
    attention.check_isolation(model, cpu, torch.float32)
    monkeypatch.setattr(
        attention, "visibility", lambda *_: lambda row, head, query, key: (query + key >= 0) & (row >= 0)
    )
    with pytest.raises(UserError, match=f"documents of a {model_type} model see each other on cpu"):
        attention.check_isolation(model, cpu, torch.float32)


def test_a_model_with_a_head_for_pairs_can_be_checked_too():
    attention.register()
    config = make_config("bert")
    model = AutoModelForPreTraining.from_config(config, attn_implementation=attention.IMPLEMENTATION).train()
    attention.check_isolation(model, torch.device("cpu"), torch.float32)
    assert model.training


@pytest.mark.parametrize("model_type", ["gpt2", "modernbert"])
def test_an_exported_model_is_an_ordinary_one(models, model_type, tmp_path):
    models[model_type].save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in json.dumps(json.loads((tmp_path / "config.json").read_bytes()))
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForMaskedLM
    assert auto.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
