"""Each optimizer's steps are those of torch's or of its paper's formula; what decays; what no ds_config can carry."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from data_prep.errors import UserError
from pipeline import update_rules
from pipeline.batch import BatchPlan
from pipeline.ds_config import check_optimizer, complete_ds_config, merge_into_recipe
from pipeline.optimizer import hidden_matrices, make_optimizer, parameter_groups
from pipeline.recipe import OptimizerSection, check_recipe
from pipeline.update_rules import Deal, orthogonal

TYPES = ["AdamW", "Lamb", "Lion", "Muon"]
LR = 3e-3


def tiny_gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=24))


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    return BertForPreTraining(
        BertConfig(
            vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24,
            max_position_embeddings=24,
        )
    )  # fmt: skip


def section(kind: str, **fields: Any) -> OptimizerSection:
    return OptimizerSection(type=kind, lr=LR, **{"betas": (0.9, 0.98), "weight_decay": 0.1, **fields})


def made(model: nn.Module, kind: str, **fields: Any) -> optim.Optimizer:
    return make_optimizer(model, section(kind, **fields), {"zero_optimization": {"stage": 0}})


def set_gradients(model: nn.Module, step: int) -> None:
    """Gradients of sizes as different as a model's."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (index % 5 - 3)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + step)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_close(found: nn.Module, expected: dict[str, Any], **tolerance: float) -> None:
    for name, weight in weights(found).items():
        torch.testing.assert_close(weight, torch.as_tensor(expected[name], dtype=weight.dtype), msg=name, **tolerance)


# Which weights.


@pytest.mark.parametrize("make", [tiny_gpt, tiny_bert])
@pytest.mark.parametrize("kind", TYPES)
def test_biases_and_norms_do_not_decay(make: Callable[[], nn.Module], kind: str) -> None:
    model = make()
    groups = made(model, kind).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = name.endswith(".bias") or "ln_" in name or "LayerNorm" in name
        assert decays.pop(id(parameter)) == (0.0 if plain else 0.1), name
    assert not decays, "every weight is in one group"


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    def names(model: nn.Module) -> set[str]:
        taken = {id(parameter) for parameter in hidden_matrices(model)}
        return {name for name, parameter in model.named_parameters() if id(parameter) in taken}

    assert names(tiny_gpt()) == {
        f"transformer.h.{layer}.{matrix}.weight"
        for layer in (0, 1)
        for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert names(tiny_bert()) == {
        f"bert.encoder.layer.0.{matrix}.weight"
        for matrix in (
            *(f"attention.self.{which}" for which in ("query", "key", "value")),
            "attention.output.dense", "intermediate.dense", "output.dense",
        )
    }  # fmt: skip


def test_frozen_weights_are_left_out() -> None:
    model = tiny_gpt()
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad_(False)
    for kind in TYPES:
        assert all(p.requires_grad for group in made(model, kind).param_groups for p in group["params"])
    assert len(hidden_matrices(model)) == 4


def test_muon_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"^optimizer.type is Muon, but the model stacks no layers .*; take AdamW$"):
        made(nn.Linear(3, 3), "Muon")


# Steps.


def test_lion_is_its_papers_formula() -> None:
    model = tiny_gpt()
    expected = {name: weight.double().numpy() for name, weight in weights(model).items()}
    moments = {name: np.zeros_like(weight) for name, weight in expected.items()}
    optimizer = made(model, "Lion")
    train(model, optimizer, 6)
    for step in range(6):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient, lr = parameter.grad.double().numpy(), LR * (1 + step)
            direction = np.sign(0.9 * moments[name] + 0.1 * gradient)
            decay = 0.1 if parameter.ndim > 1 else 0.0
            expected[name] = expected[name] - lr * (direction + decay * expected[name])
            moments[name] = 0.98 * moments[name] + 0.02 * gradient
    assert_close(model, expected, rtol=1e-5, atol=1e-6)


def test_lamb_is_its_papers_formula() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()  # has no norm to scale to
    expected = {name: weight.double().numpy() for name, weight in weights(model).items()}
    first, second = ({name: np.zeros_like(weight) for name, weight in expected.items()} for _ in range(2))
    optimizer = made(model, "Lamb", eps=1e-6)
    train(model, optimizer, 6)
    for step in range(6):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient, weight = parameter.grad.double().numpy(), expected[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.98 * second[name] + 0.02 * gradient**2
            change = first[name] / (1 - 0.9 ** (step + 1))
            change = change / (np.sqrt(second[name] / (1 - 0.98 ** (step + 1))) + 1e-6)
            if parameter.ndim > 1:
                change = change + 0.1 * weight
                norm = np.sqrt((weight**2).sum())
                change = change * (norm / np.sqrt((change**2).sum()) if norm else 1.0)
            expected[name] = weight - LR * (1 + step) * change
    assert_close(model, expected, rtol=1e-4, atol=1e-6)


def test_muon_is_torchs_at_adamws_root_mean_square_and_adamw_for_the_rest() -> None:
    model, theirs = tiny_gpt(), tiny_gpt()
    matrices = hidden_matrices(theirs)
    taken = {id(matrix) for matrix in matrices}
    rest = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in taken]}
        for group in parameter_groups(theirs, 0.1)
    ]
    train(model, made(model, "Muon", momentum=0.9), 6)
    # The gradients depend on the step alone, so one may train after the other.
    train(theirs, optim.Muon(matrices, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"), 6)
    train(theirs, optim.AdamW(rest, betas=(0.9, 0.98), fused=True), 6)
    assert_close(model, weights(theirs), rtol=0, atol=0)


def test_a_step_of_muon_moves_a_matrix_as_far_as_adamw_usually_does() -> None:
    """0.2 to 0.4 of the learning rate, root mean square (Liu et al. 2025, section 2.2)."""
    model = tiny_gpt()
    before = weights(model)
    train(model, made(model, "Muon", weight_decay=0.0), 1)
    for name, parameter in model.named_parameters():
        if "c_" in name and parameter.ndim == 2:
            moved = (parameter - before[name]).square().mean().sqrt().item() / LR
            assert 0.12 < moved < 0.26, name


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 7)])
def test_a_direction_is_nearly_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = orthogonal(matrix.bfloat16()).float()
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = u.T @ found @ vt.T
    assert (kept - torch.diag(kept.diagonal())).abs().max() < 0.1
    assert kept.diagonal().min() > 0.3
    assert kept.diagonal().max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(shape).bfloat16()), torch.zeros(shape).bfloat16())


@pytest.mark.parametrize("kind", TYPES)
def test_deepspeeds_first_step_without_gradients_leaves_no_trace(kind: str) -> None:
    """bf16 at stage 0: the rate is 0 until a step sets one, and the engine clears the state."""
    model, plain = tiny_gpt(), tiny_gpt()
    optimizer = made(model, kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_close(model, weights(plain), rtol=0, atol=0)
    optimizer.state.clear()
    train(model, optimizer, 3)
    train(plain, made(plain, kind), 3)
    assert_close(model, weights(plain), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_state_goes_on_bitwise(kind: str) -> None:
    model = tiny_gpt()
    optimizer = made(model, kind)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    resumed = made(other, kind)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    assert_close(other, weights(model), rtol=0, atol=0)


# Slices of matrices.


class Ranks:
    """Ranks as threads that exchange tensors as `all_to_all_single` does."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._sent: dict[int, tuple[Tensor, ...]] = {}
        self._rank = threading.local()
        self.world = world

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        rank = self._rank.number
        self._sent[rank] = input.clone().split(input_splits)
        self._barrier.wait()
        received = [self._sent[other][rank] for other in range(self.world)]
        assert [len(piece) for piece in received] == output_splits
        output.copy_(torch.cat(received))
        self._barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: dict[int, Any] = {}

        def on(rank: int) -> None:
            self._rank.number = rank
            try:
                results[rank] = work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(self.world)]


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    world=st.integers(1, 5),
    kept=st.sampled_from(["joined", "each"]),
)
def test_directions_of_slices_are_those_of_whole_matrices(shapes: list[tuple[int, int]], world: int, kept: Any) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    matrices = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    if kept == "joined":  # DeepSpeed pads to a multiple of twice the ranks
        joined = torch.cat([matrix.flatten() for matrix in matrices])
        flats = list(nn.functional.pad(joined, (0, -len(joined) % (2 * world))).view(world, -1))
    else:
        padded = [nn.functional.pad(m.flatten(), (0, -m.numel() % world)).view(world, -1) for m in matrices]
        flats = list(torch.cat(padded, dim=1))
    ranks = Ranks(world)

    def work(rank: int) -> Tensor:
        found = torch.zeros_like(flats[rank])
        deal = Deal(shapes, len(found), kept, world, rank)
        for _, place, direction in deal.exchange(flats[rank]):
            found[place] += direction
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_rules.distributed, "all_to_all_single", ranks.all_to_all_single)
        found = torch.stack(ranks.run(work))
    if kept == "joined":
        parts = found.flatten()[: sum(m.numel() for m in matrices)].split([m.numel() for m in matrices])
    else:
        parts = found.split([-(-m.numel() // world) for m in matrices], dim=1)
    for matrix, part in zip(matrices, parts, strict=True):
        assert torch.equal(part.flatten()[: matrix.numel()].view(matrix.shape), orthogonal(matrix))


def test_the_parts_of_a_group_at_stage_3_take_their_matrices_in_turn() -> None:
    shapes = [(4, 6), (3, 5), (2, 2), (8, 8)]
    deals, rest = [], shapes
    for numel in (8 + 5, 2 + 22):  # three ranks: a third of each, rounded up
        deals.append(Deal(rest, numel, "each", 3, 0).shapes)
        rest = rest[len(deals[-1]) :]
    assert deals == [shapes[:2], shapes[2:]]


def test_the_dearest_matrices_are_dealt_evenly() -> None:
    shapes = [(64, 64)] * 4 + [(64, 16)] * 4
    owners = update_rules._owners(shapes, 4)
    assert sorted(owners[:4]) == sorted(owners[4:]) == [0, 1, 2, 3]


# What the ds_config has to allow.


@pytest.mark.parametrize(
    ("kind", "zero", "message"),
    [
        (
            "Lamb",
            {"stage": 2},
            "optimizer.type is Lamb, whose steps need the norms of whole weights, but ZeRO stage 2 keeps slices; take a"
            " ds_config of stage 0 (ds_configs/zero0.json), or AdamW, Lion or Muon",
        ),
        (
            "Muon",
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "optimizer.type is Muon, whose states stay on the device, but the ds_config offloads them to cpu"
            " (offload_optimizer); take a ds_config without it, or AdamW",
        ),
        (
            "Lion",
            {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/d"}},
            "optimizer.type is Lion, whose states stay on the device, but the ds_config offloads them to nvme"
            " (offload_optimizer); take a ds_config without it, or AdamW",
        ),
        (
            "Muon",
            {"stage": 1, "round_robin_gradients": True},
            "optimizer.type is Muon, which finds its matrices where ZeRO puts them without"
            " zero_optimization.round_robin_gradients; leave that key out of the ds_config, or take AdamW",
        ),
    ],
)
def test_a_ds_config_that_an_optimizer_cannot_work_on_is_refused(kind: str, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer({"zero_optimization": zero}, kind)
    assert str(caught.value) == message
    check_optimizer({"zero_optimization": zero}, "AdamW")
    check_optimizer({"zero_optimization": {"stage": 0}}, kind)


def test_a_learning_rate_for_deepspeeds_muon_is_not_taken_for_ours() -> None:
    stated = {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}
    with pytest.raises(UserError) as caught:
        merge_into_recipe({}, stated, recipe_source="r.yaml", config_source="x.json")
    assert str(caught.value) == (
        "x.json: optimizer.type is 'Muon', whose learning rate has another scale in DeepSpeed (the recipe's is AdamW's)"
        "; state the optimizer in the recipe and leave it out of the ds_config"
    )


@pytest.mark.parametrize("name", ["OneBitAdam", "OnebitAdam", "ZeroOneAdam", "OneBitLamb"])
def test_the_1_bit_optimizers_are_gone_from_deepspeed(name: str) -> None:
    import importlib.util

    assert importlib.util.find_spec("deepspeed.runtime.fp16.onebit") is None, "then the message is wrong"
    raw = {
        "objective": "causal",
        "model": {"config": "demo-gpt"},
        "data": {"shards": "s", "tokenizer": "t", "sequence_length": 8},
        "training": {"global_batch_size": 8, "max_steps": 1},
        "optimizer": {"type": name, "lr": 1e-3},
    }
    with pytest.raises(UserError) as caught:
        check_recipe(raw, "r.yaml")
    assert str(caught.value) == (
        f"r.yaml: optimizer.type: found {name}, which DeepSpeed no longer has (0.19.8 is without its 1-bit optimizers);"
        " expected AdamW, Lamb, Lion or Muon"
    )


def test_deepspeed_is_told_that_the_optimizers_of_our_own_are_meant() -> None:
    raw = {
        "objective": "causal",
        "model": {"config": "demo-gpt"},
        "data": {"shards": "s", "tokenizer": "t", "sequence_length": 8},
        "training": {"global_batch_size": 8, "max_steps": 1},
    }
    for kind in TYPES:
        recipe = check_recipe({**raw, "optimizer": {"type": kind, "lr": 1e-3}}, "r.yaml")
        config = complete_ds_config({"zero_optimization": {"stage": 0}}, recipe, BatchPlan(8, 8, 1, 1))
        assert config.get("zero_allow_untested_optimizer", False) == (kind != "AdamW")
