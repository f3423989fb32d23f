"""Every optimizer trains on two real ranks, with the losses that one rank has in fp32, and resumes exactly."""

import pytest

from tests.distributed.ranks import (
    NO_DROPOUT,
    ds_config_with,
    metrics,
    pretrain,
    relative_difference,
    without_last_checkpoint,
)

pytestmark = pytest.mark.ranks
STEPS = 12
OPTIMIZERS = {
    "Lamb": {"lr": 3e-2},
    "Lion": {"lr": 2e-3, "betas": [0.9, 0.99]},
    "Muon": {"lr": 1e-2},
}
# Each keeps matrices in another way: whole, slices of their concatenation (two classes of DeepSpeed's, BF16_Optimizer
# at zero1), slices of each, in parts of the group.
RUNS = [
    ("Lamb", "zero0"),
    ("Lion", "zero2"),
    ("Muon", "zero1"),
    ("Muon", "zero2_fp32"),
    ("Muon", "zero3"),
]


@pytest.fixture(scope="module")
def recipe_of(write_recipe):
    def write(kind):
        return write_recipe(
            "causal",
            model=NO_DROPOUT["causal"],
            training={"max_steps": STEPS},
            optimizer={"type": kind, **OPTIMIZERS[kind]},
            checkpoint={"every_steps": STEPS // 2},
        )

    return {kind: write(kind) for kind in OPTIMIZERS}


@pytest.fixture(scope="module")
def reference(recipe_of, tmp_path_factory):
    """reference(kind) -> the steps of one rank in fp32 with the whole batch (tests/pipeline/test_optimizer.py)."""
    found = {}

    def run(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"reference-{kind}")
            pretrain(1, "ds_configs/zero0_fp32.json", recipe_of[kind], folder)
            found[kind] = metrics(folder)
        return found[kind]

    return run


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def two_ranks(request, recipe_of, tmp_path_factory):
    """(kind, ds_config, its path, run) of two ranks with two micro-batches each."""
    kind, name = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{name}")
    changes = {"zero_optimization": {"stage": 3, "sub_group_size": 5000}} if name == "zero3" else {}
    spread = ds_config_with(folder / "ds.json", f"{name}.json", train_micro_batch_size_per_gpu=2, **changes)
    finished = pretrain(2, spread, recipe_of[kind], folder / "run")
    precision = "fp32" if name.endswith("fp32") else "bf16"
    assert f"ZeRO {name[4]}, {precision}, {kind} on" in finished.stdout
    return kind, name, spread, folder / "run"


def test_losses_and_norms_are_those_of_one_rank_in_fp32(two_ranks, reference):
    kind, name, _, run = two_ranks
    steps = metrics(run)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    # Lion's signs and Muon's directions, found in bf16, pass rounding on.
    loss_bound, norm_bound = (1e-4, 1e-3) if name.endswith("fp32") else (3e-3, 1e-1)
    for ours, expected in zip(steps, reference(kind), strict=True):
        assert ours["learning_rate"] == expected["learning_rate"]
        assert relative_difference(ours["loss"], expected["loss"]) < loss_bound
        assert relative_difference(ours["grad_norm"], expected["grad_norm"]) < norm_bound


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(two_ranks, recipe_of, tmp_path):
    kind, _, spread, run = two_ranks
    resumed = without_last_checkpoint(run, tmp_path / "run", STEPS // 2)
    finished = pretrain(2, spread, recipe_of[kind], resumed)
    assert f"after step {STEPS // 2}" in finished.stdout
    for ours, expected in zip(metrics(resumed), metrics(run), strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (expected["loss"], expected["grad_norm"]), ours["step"]


def test_an_optimizer_that_a_stage_cannot_carry_ends_in_one_line(recipe_of, tmp_path):
    finished = pretrain(2, "ds_configs/zero2.json", recipe_of["Lamb"], tmp_path / "run", check=False)
    assert finished.status == 1
    assert finished.error_lines == [
        "error: optimizer.type is Lamb, whose steps need the norms of whole weights, but ZeRO stage 2 keeps slices;"
        " take a ds_config of stage 0 (ds_configs/zero0.json), or AdamW, Lion or Muon"
    ]
