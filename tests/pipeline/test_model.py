"""Models, their cost, and the loss."""

import json

import pytest
import torch
from torch.nn import functional

from data_prep.encoding import SpecialTokens, TokenizerInfo
from data_prep.errors import UserError
from pipeline.hardware import peak_flops
from pipeline.heads import LossHead
from pipeline.loader import DeviceBatch
from pipeline.model import build_model, make_model_config, measure_model, read_model_config
from pipeline.objective import losses
from pipeline.recipe import check_recipe
from pipeline.samples import IGNORED
from pipeline.startup import set_environment

SPECIAL = SpecialTokens(end_of_document=5, padding=1, classification=2, separator=3, mask=4, unknown=0)


def batch_of(ids, labels, **further):
    """A batch of these ids and labels [batch, sequence]; IGNORED ones are no targets."""
    targets = (labels.flatten() != IGNORED).nonzero().flatten()
    given = {"targets": targets, "boundaries": None, "longest": ids.shape[1], **further}
    target_ids = labels.flatten()[targets]
    return DeviceBatch(ids, target_ids, corpus=torch.zeros(len(ids)), target_count=len(target_ids), **given)


TINY = {"base": "demo-gpt", "n_layer": 1, "n_embd": 24, "n_head": 2}


def recipe(config, objective="causal", length=16, **data):
    return check_recipe(
        {
            "objective": objective,
            "model": {"config": config},
            "data": {"shards": "s", "tokenizer": "t", "sequence_length": length, **data},
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
    batch = batch_of(torch.randint(6, 100, (2, 16)), torch.randint(6, 100, (2, 16)))
    loss = losses(LossHead(model, batch.input_ids.device), batch, torch.float32).trained
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
    found = losses(LossHead(model, ids.device), batch_of(ids, labels), torch.bfloat16)
    assert found.of_tokens.dtype == torch.float32 and found.of_tokens.shape == (27,) and found.of_pairs is None
    torch.testing.assert_close(found.of_tokens.sum(), expected)
    torch.testing.assert_close(found.trained, expected)


def test_a_batch_without_targets_has_loss_zero_and_gradients_of_zero(tmp_path):
    """A micro-batch of short samples may have none, and ZeRO-3's ranks still have to go through backward together."""
    config = make_model_config(recipe(TINY), tokenizer(tmp_path))
    model = build_model(config, "causal", 1)
    ids = torch.randint(6, 100, (2, 16))
    loss = losses(LossHead(model, ids.device), batch_of(ids, torch.full((2, 16), IGNORED)), torch.float32).trained
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_pairs_have_a_loss_of_their_own_and_rows_that_do_not_count(model_type, tmp_path):
    values = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64, "embedding_size": 32}  # fmt: skip
    config = make_model_config(recipe(values, "mlm", packing="sop"), tokenizer(tmp_path))
    model = build_model(config, "mlm", 1, pairs=True).eval()
    ids, labels = torch.randint(6, 100, (3, 16)), torch.randint(6, 100, (3, 16))
    types, turned = torch.zeros_like(ids), torch.tensor([1, IGNORED, 0])
    types[:, 9:] = 1
    batch = batch_of(ids, labels, token_types=types, pair_labels=turned)
    found = losses(LossHead(model, ids.device), batch, torch.float32)
    output = model(input_ids=ids, token_type_ids=types)
    head = output.seq_relationship_logits if model_type == "bert" else output.sop_logits
    expected = -functional.log_softmax(head, -1)[[0, 2], [1, 0]]
    torch.testing.assert_close(found.of_pairs, torch.stack([expected[0], torch.zeros(()), expected[1]]))
    expected = functional.cross_entropy(output.prediction_logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found.of_tokens.mean(), expected)


def test_pairs_need_a_model_that_has_a_head_for_them(tmp_path):
    values = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(UserError, match=r"data\.packing is nsp, which transformers has no roberta model for"):
        make_model_config(recipe(values, "mlm", packing="nsp"), tokenizer(tmp_path))


def test_gpt2_small_costs_what_the_papers_formula_says(tmp_path):
    config = make_model_config(recipe("gpt2-124m", length=1024), tokenizer(tmp_path, 50257))
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    size = measure_model(model, "causal", 1024)
    assert size.parameters == 124_439_808
    assert size.matrix_parameters == 124_439_808 - 1024 * 768  # the positions are looked up; wte is the output too
    assert size.flops_a_token == 6 * size.matrix_parameters + 6 * 12 * 768 * 1024


def test_an_encoder_under_a_causal_objective_does_not_see_what_it_predicts(tmp_path):
    values = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip
    config = make_model_config(recipe(values), tokenizer(tmp_path))
    model = build_model(config, "causal", 1).eval()
    ids = torch.randint(6, 100, (1, 16))
    changed = ids.clone()
    changed[0, 9] = 6 + (changed[0, 9] - 5) % 90
    before, after = (model(input_ids=tokens).logits[0] for tokens in (ids, changed))
    assert torch.equal(before[:9], after[:9]) and not torch.equal(before[9], after[9])


def test_positions_that_a_model_keeps_for_padding_are_not_there_for_samples(tmp_path):
    values = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 18}  # fmt: skip
    make_model_config(recipe(values, "mlm", 16), tokenizer(tmp_path))
    with pytest.raises(UserError, match="has 18 positions, of which it keeps the first 2 for padding"):
        make_model_config(recipe(values, "mlm", 17), tokenizer(tmp_path))


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
