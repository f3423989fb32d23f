"""Computing activations again changes what is kept and what is computed, and no bit of what comes out."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.errors import UserError
from pipeline import attention, dropout
from pipeline.activation_checkpointing import check_stage, enable
from pipeline.model import auto_class
from pipeline.token_drop import install, kept_positions

LAYERS, LENGTH, VOCABULARY = 4, 24, 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "gpt2": ("causal", SIZES),  # its dropout is 0.1, and BERT's
    "llama": ("causal", {**SIZES, "num_key_value_heads": 1, "attention_dropout": 0.1}),
    "bert": ("mlm", SIZES),
    "modernbert": ("mlm", {**SIZES, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 1}),
}
BOUNDARIES = [0, 9, 15, LENGTH, LENGTH + 4, 2 * LENGTH]


def make(model_type):
    objective, values = MODELS[model_type]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **values)
    model = auto_class(objective).from_config(config, attn_implementation=attention.register()).train()
    dropout.use_in(model)
    return model


def run(model, mode, drop=False):
    """The loss, the gradients, and the FLOPs of the forward pass and of the step, under one dropout."""
    model = copy.deepcopy(model)
    enable(model, mode)
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
    arguments = attention.document_arguments(boundaries, 20, (2, LENGTH), model.config, torch.float32)
    if drop:
        keys = np.array([3, 7], dtype=np.uint64)
        arguments["kept_positions"] = torch.from_numpy(kept_positions(keys, install(model), LENGTH, 10))
    if getattr(model.config, "use_cache", False):
        arguments["use_cache"] = False
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    torch.manual_seed(5)
    with FlopCounterMode(display=False) as flops:
        logits = model(input_ids=ids, **arguments).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        forward = flops.get_total_flops()
        loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()], forward, flops.get_total_flops()


@pytest.mark.parametrize("drop", [False, True], ids=["all_tokens", "token_drop"])
@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradients_are_bitwise_those_of_kept_activations(model_type, drop):
    """With dropout, several documents a row, and layers that see a part of the tokens."""
    model = make(model_type)
    loss, gradients, _, _ = run(model, "none", drop)
    for mode in ("full", "selective"):
        found, theirs, _, _ = run(model, mode, drop)
        assert found == loss
        for ours, expected in zip(theirs, gradients, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_full_costs_the_layers_forward_pass_again_and_selective_no_flops(model_type):
    model = make(model_type)
    _, _, forward, kept = run(model, "none")
    head = 2 * 2 * LENGTH * SIZES["hidden_size"] * VOCABULARY
    if MODELS[model_type][0] == "mlm":
        head += 2 * 2 * LENGTH * SIZES["hidden_size"] ** 2  # its dense layer
    _, _, forward_full, full = run(model, "full")
    assert forward_full == forward
    # Where a layer ends with a product, and no dropout behind it, nothing needs its value to go back.
    last = 2 * 2 * LENGTH * SIZES["hidden_size"] * SIZES["intermediate_size"]
    spared = LAYERS * last if model_type in ("llama", "modernbert") else 0
    assert full - kept == forward - head - spared
    assert run(model, "selective")[2:] == (forward, kept)


def test_evaluation_is_left_alone():
    model = make("gpt2").eval()
    ids = torch.arange(LENGTH)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        enable(model, "full")
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_architecture_without_it_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("xlnet", vocab_size=50, d_model=16, n_head=2, n_layer=1)
    )
    with pytest.raises(
        UserError, match=r"model\.activation_checkpointing is full, but XLNetLMHeadModel does not support"
    ):
        enable(model, "full")


def test_selective_does_not_go_with_stage_3():
    check_stage("selective", 2)
    check_stage("full", 3)
    with pytest.raises(UserError, match=r"is selective, which does not go with ZeRO stage 3.*take full"):
        check_stage("selective", 3)
