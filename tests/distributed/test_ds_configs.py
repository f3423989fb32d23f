"""Every shipped ds_config that CPU ranks can carry out trains the same model: how is not what."""

import shutil

import pytest

from tests.distributed.ranks import NO_DROPOUT, ROOT, metrics, pretrain, relative_difference

pytestmark = pytest.mark.ranks
REFERENCE = "zero0_fp32"
OTHERS = (
    "zero2_fp32", "zero0", "zero1", "zero2", "zero2_autocast", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload",
)  # fmt: skip
# They need a GPU or an NVMe drive: tests/pipeline/test_ds_config.py has the errors.
ELSEWHERE = ("zero2_fp16", "zero3_offload_nvme", "zeropp")


@pytest.fixture(scope="module")
def run_with(write_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ds_configs")
    recipe = write_recipe(
        "causal", model=NO_DROPOUT["causal"], training={"max_steps": 8}, checkpoint={"every_steps": 0}
    )

    def run(name: str):
        finished = pretrain(2, f"ds_configs/{name}.json", recipe, folder / name)
        return finished, metrics(folder / name)

    return run


@pytest.fixture(scope="module")
def reference(run_with):
    return run_with(REFERENCE)[1]


def test_all_shipped_ds_configs_are_here():
    shipped = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    assert shipped == {REFERENCE, *OTHERS, *ELSEWHERE}


@pytest.mark.parametrize("name", OTHERS)
def test_losses_and_gradient_norms_are_those_of_plain_fp32_to_rounding(name, run_with, reference):
    if name.endswith("offload") and shutil.which("g++") is None:
        pytest.skip("offload compiles an op, and g++ is not installed")
    finished, steps = run_with(name)
    # bf16 keeps 8 bits of a number: 0.4 % each, averaged over many in a loss.
    loss_bound, norm_bound = (1e-5, 1e-4) if name.endswith("fp32") else (3e-3, 3e-2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    for ours, expected in zip(steps, reference, strict=True):
        assert relative_difference(ours["loss"], expected["loss"]) < loss_bound
        assert relative_difference(ours["grad_norm"], expected["grad_norm"]) < norm_bound
    precision = {"zero2_fp32": "fp32", "zero2_autocast": "fp32 with bf16 autocast"}.get(name, "bf16")
    assert f"ZeRO {name[4]}, {precision}, AdamW" in finished.stdout
    assert (" offloaded to cpu on " in finished.stdout) == name.endswith("offload")
