"""Models, their cost, and the loss."""

import json

import pytest
import torch
from torch.nn import functional

from data_prep.encoding import SpecialTokens, TokenizerInfo
from data_prep.errors import UserError
from pipeline.model import build_model, make_model_config, measure_model, peak_flops, read_model_config
from pipeline.objective import loss_sum
from pipeline.recipe import check_recipe
from pipeline.samples import IGNORED
from pipeline.startup import set_environment

SPECIAL = SpecialTokens(end_of_document=5, padding=1, classification=2, separator=3, mask=4, unknown=0)


TINY = {"base": "demo-gpt", "n_layer": 1, "n_embd": 24, "n_head": 2}


def recipe(config, objective="causal", length=16):
    return check_recipe(
        {
            "objective": objective,
            "model": {"config": config},
            "data": {"shards": "s", "tokenizer": "t", "sequence_length": length},
            "training": {"global_batch_size": 1, "max_steps": 1},
            "optimizer": {"lr": 1e-3},
        },
        "test",
    )


def tokenizer(tmp_path, vocab_size=100):
    return TokenizerInfo(tmp_path, "f" * 64, vocab_size, SPECIAL)


@pytest.mark.parametrize(
    ("values", "objective"),
    [
        ({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64, "max_position_embeddings": 64}, "causal"),
        ({"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64}, "causal"),
        ({"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64}, "mlm"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)  # fmt: skip
def test_any_architecture_that_transformers_knows_trains_by_its_json(values, objective, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    asked = recipe(str(path), objective)
    config = make_model_config(asked, tokenizer(tmp_path))
    model = build_model(config, objective, 1)
    assert config.vocab_size == 100 and config.eos_token_id == 5
    loss = loss_sum(model, torch.randint(6, 100, (2, 16)), torch.randint(6, 100, (2, 16)))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    config = make_model_config(recipe(TINY), tokenizer(tmp_path))
    torch.manual_seed(1)
    first = build_model(config, "causal", 7).state_dict()
    torch.manual_seed(2)
    torch.rand(5)
    again, other = build_model(config, "causal", 7).state_dict(), build_model(config, "causal", 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_loss_is_the_sum_over_targets_in_float32(tmp_path):
    config = make_model_config(recipe(TINY), tokenizer(tmp_path))
    model = build_model(config, "causal", 1).bfloat16()
    ids, labels = torch.randint(6, 100, (2, 16)), torch.randint(6, 100, (2, 16))
    labels[0, :5] = IGNORED
    logits = model(input_ids=ids).logits.float()
    expected = sum(
        -functional.log_softmax(logits[row, position], 0)[labels[row, position]]
        for row in range(2)
        for position in range(16)
        if labels[row, position] != IGNORED
    )
    loss = loss_sum(model, ids, labels, (labels.flatten() != IGNORED).nonzero().flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_targets_has_loss_zero_and_gradients_of_zero(tmp_path):
    """A micro-batch of short samples may have none, and ZeRO-3's ranks still have to go through backward together."""
    config = make_model_config(recipe(TINY), tokenizer(tmp_path))
    model = build_model(config, "causal", 1)
    ids = torch.randint(6, 100, (2, 16))
    loss = loss_sum(model, ids, torch.full((2, 16), IGNORED), torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_gpt2_small_costs_what_the_papers_formula_says(tmp_path):
    config = make_model_config(recipe("gpt2-124m", length=1024), tokenizer(tmp_path, 50257))
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    size = measure_model(model, "causal", 1024)
    assert size.parameters == 124_439_808
    assert size.matrix_parameters == 124_439_808 - 1024 * 768  # the positions are looked up; wte is the output too
    assert size.flops_a_token == 6 * size.matrix_parameters + 6 * 12 * 768 * 1024


def test_mistakes_in_the_model_name_what_is_known(tmp_path):
    with pytest.raises(UserError, match="did you mean gpt2-124m"):
        read_model_config("gpt2-124")
    with pytest.raises(UserError, match="did you mean n_layer"):
        read_model_config({"base": "demo-gpt", "n_layers": 2})
    with pytest.raises(UserError, match="no model_type"):
        (tmp_path / "config.json").write_text("{}")
        read_model_config(str(tmp_path))
    with pytest.raises(UserError, match="no t5 model"):
        make_model_config(recipe({"model_type": "t5"}), tokenizer(tmp_path))
    with pytest.raises(UserError, match="knows no model_type"):
        make_model_config(recipe({"model_type": "gtp2"}), tokenizer(tmp_path))


def test_peaks_are_found_by_the_makers_names():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_ranks_share_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for given, expected in ((None, "2"), ("3", "3")):
        environment = {"RANK": "0", "LOCAL_SIZE": "4"} | ({"OMP_NUM_THREADS": given} if given else {})
        monkeypatch.setattr("os.environ", environment)
        set_environment()
        assert environment["OMP_NUM_THREADS"] == expected
