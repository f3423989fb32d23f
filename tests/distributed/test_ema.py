"""The average of the weights at every ZeRO stage and precision, against one that is kept by hand."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.objective import losses
from tests.distributed.ranks import ROOT, launch
from tests.pipeline.test_objective import CPU, LossHead, batch_of, small_model

pytestmark = pytest.mark.ranks
# Each way in which DeepSpeed keeps master weights; the other ds_configs are variants of these.
CONFIGS = ["zero0_fp32", "zero0", "zero1", "zero2", "zero3_hpz"]
if shutil.which("g++"):
    CONFIGS.append("zero2_offload")  # it compiles an op


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found, ds_config by ds_config."""
    folder = tmp_path_factory.mktemp("averages")
    paths = [ROOT / "ds_configs" / f"{name}.json" for name in CONFIGS]
    launch(2, Path(__file__).with_name("averages.py"), folder, *paths)
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_with_the_average_and_then_with_the_very_weights_of_before(name, found):
    for rank in found:
        of_run = rank[name]
        (before, loss_before), (inside, loss_inside), (after, loss_after) = (
            of_run[when] for when in ("before", "inside", "after")
        )
        for weight, average in of_run["by_hand"].items():
            tolerance = 1e-6 if inside[weight].dtype == torch.float32 else 1e-2
            torch.testing.assert_close(inside[weight].float(), average, rtol=tolerance, atol=1e-7)
            assert torch.equal(before[weight], after[weight])
        moved = sum(not torch.equal(before[weight], inside[weight]) for weight in before)
        assert moved > 10, "weights and averages have to differ for the comparison to mean something"
        assert loss_after == loss_before
        model = small_model("gpt2", "causal").eval()
        model.load_state_dict(of_run["by_hand"], strict=False)
        expected = losses(LossHead(model, CPU), batch_of("causal", seed=7), torch.float32).of_tokens.mean().item()
        assert abs(loss_inside - expected) < 0.1 * abs(loss_before - expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_holds_the_average_and_going_on_from_it_is_bitwise_the_run(name, found):
    for rank in found:
        of_run = rank[name]
        assert set(of_run["by_hand"]) < set(of_run["stored"])
        for weight, average in of_run["by_hand"].items():
            torch.testing.assert_close(of_run["stored"][weight], average, rtol=1e-6, atol=1e-8)
        assert torch.equal(of_run["stored"]["lm_head.weight"], of_run["stored"]["transformer.wte.weight"])
        assert of_run["resumed"]
        straight, resumed = of_run["last"]
        assert all(torch.equal(straight[weight], resumed[weight]) for weight in straight)


@pytest.mark.parametrize("name", CONFIGS)
def test_distributions_are_of_whole_weights_and_of_what_a_step_changed_and_leave_the_run_as_it_was(name, found):
    """That the run is left as it was is what its equality with the resumed one, above, says."""
    for rank in found:
        of_run = rank[name]
        last = of_run["last"][0]
        assert set(of_run["distributions"]) == set(last)
        for weight, (whole, norm, update_norm, earlier) in of_run["distributions"].items():
            assert torch.equal(whole, last[weight])
            assert norm == pytest.approx(last[weight].norm().item(), rel=1e-5)
            assert update_norm == pytest.approx((last[weight] - earlier).norm().item(), rel=1e-4, abs=1e-9)
        assert of_run["distributions"]["transformer.wte.weight"][2] > 1e-3
