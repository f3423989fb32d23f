"""The loss without whole logits where parameters come and go around each module: ZeRO-3, with tied embeddings."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.model import build_model
from tests.distributed.ranks import launch
from tests.pipeline.test_objective import batch_of, gradients, plain, small_config

pytestmark = pytest.mark.ranks
RANKS = 2
MODELS = [("gpt2", "causal", False), ("bert", "mlm", False), ("albert", "mlm", True)]
CASES = [(*model, bf16) for model in MODELS for bf16 in (False, True)]


def case_of(model_type, objective, pairs, bf16):
    """Rank 1 has no target."""
    batches = [batch_of(objective, seed) for seed in range(RANKS)]
    none = torch.zeros(0, dtype=torch.int64)
    batches[1] = dataclasses.replace(batches[1], targets=none, target_ids=none)
    if pairs:
        turned = torch.tensor([1, -100, 0])
        batches = [dataclasses.replace(batch, boundaries=None, pair_labels=turned) for batch in batches]
    targets = batches[0].target_ids.numel()
    return {
        "config": small_config(model_type), "objective": objective, "pairs": pairs, "bf16": bf16, "batches": batches,
        "targets": targets, "z_loss": 0.01,
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, case by case."""
    folder = tmp_path_factory.mktemp("zero3-losses")
    torch.save([case_of(*case) for case in CASES], folder / "cases")
    launch(RANKS, Path(__file__).with_name("loss_gradients.py"), folder / "cases", folder / "found")
    return [torch.load(folder / f"found.{rank}") for rank in range(RANKS)]


def of_plain_logits(case, dtype):
    """Gradients of the sum over both ranks' targets divided by their number, and the mean over ranks of pairs."""
    model = build_model(copy.deepcopy(case["config"]), case["objective"], 1, pairs=case["pairs"]).to(dtype)
    total = 0.0
    for batch in case["batches"]:
        trained, _, of_pairs = plain(model, batch, z_loss=0.01)
        total = total + trained / case["targets"] + (0.0 if of_pairs is None else of_pairs.sum() / RANKS)
    return gradients(model, total)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[0]}-{('fp32', 'bf16')[case[3]]}" for case in CASES])
def test_zero3_has_the_gradients_of_plain_logits_also_where_a_rank_has_no_targets(found, number):
    case = case_of(*CASES[number])
    of_ranks = [rank[number] for rank in found]
    assert all(rank["head"] == (True, True) and torch.equal(rank["of_tokens"], rank["evaluated"]) for rank in of_ranks)
    assert len(of_ranks[1]["of_tokens"]) == 0
    exact = of_plain_logits(case, torch.float32)
    rounded = of_plain_logits(case, torch.bfloat16) if case["bf16"] else {}
    largest = max(float(gradient.norm()) for gradient in exact.values() if gradient is not None)
    for name, gradient in exact.items():
        if gradient is None:
            continue
        ours = of_ranks[0]["gradients"][name]
        assert torch.equal(ours, of_ranks[1]["gradients"][name])
        if case["bf16"]:
            allowed = 1.5 * (rounded[name].float() - gradient).norm() + 5e-3 * largest
        else:
            allowed = 2e-6 * gradient.norm() + 3e-7 * largest
        assert (ours.float() - gradient).norm() <= allowed, name
