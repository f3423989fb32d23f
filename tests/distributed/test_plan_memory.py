"""What the plan says DeepSpeed holds is what its ranks hold, to 5 %."""

import json
import shutil

import pytest

from pipeline.configuration import resolve
from pipeline.costs import state_memory
from pipeline.plan import zero_of
from pipeline.recipe import DEFAULT_RECIPE, OptimizerSection
from tests.distributed.ranks import ROOT, ds_config_with, launch
from tests.distributed.state_memory import ACCUMULATION, MODEL

pytestmark = pytest.mark.ranks
SHIPPED = ("zero0_fp32", "zero0", "zero1", "zero2", "zero2_fp32", "zero3")
# Buckets that fill up several times in a backward pass; and states on the host.
SMALL = {"zero2": "small_buckets_2", "zero2_fp32": "small_buckets_2_fp32", "zero3": "small_buckets_3"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOADED = {"offload_2": ("zero2", OFFLOAD), "offload_3": ("zero3", {**OFFLOAD, "offload_param": {"device": "cpu"}})}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="offload compiles an op, and g++ is missing")


def parameter_groups():
    """Elements of each matrix and each vector of the script's GPT-2, by its architecture."""
    width, layers = MODEL["n_embd"], MODEL["n_layer"]
    matrices = [MODEL["vocab_size"] * width, MODEL["n_positions"] * width]
    vectors = []
    for _ in range(layers):
        matrices += [3 * width * width, width * width, 4 * width * width, 4 * width * width]
        vectors += [width, width, 3 * width, width, width, width, 4 * width, width]
    return (tuple(matrices), (*vectors, width, width))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan_memory")
    found = {name: ROOT / f"ds_configs/{name}.json" for name in SHIPPED}

    def changed(name, base, **changes):
        section = json.loads((ROOT / f"ds_configs/{base}.json").read_text())["zero_optimization"]
        found[name] = ds_config_with(folder / f"{name}.json", f"{base}.json", zero_optimization={**section, **changes})

    for base, name in SMALL.items():
        changed(name, base, reduce_bucket_size=8_000_000)
    changed("short_reuse_3", "zero3", reduce_bucket_size=8_000_000, stage3_max_reuse_distance=20_000_000,
            stage3_prefetch_bucket_size=5_000_000)  # fmt: skip
    for name, (base, changes) in OFFLOADED.items():
        if shutil.which("g++") is not None:
            changed(name, base, **changes)
    return found


@pytest.fixture(scope="module")
def measured(paths, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "bytes.json"
    launch(2, "tests/distributed/state_memory.py", output, *paths.values())
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "name",
    [*SHIPPED, *SMALL.values(), "short_reuse_3", *(pytest.param(name, marks=needs_compiler) for name in OFFLOADED)],
)
def test_predicted_memory_is_within_5_percent_of_the_tensors_of_two_ranks(name, measured, paths):
    _, ds_config = resolve(DEFAULT_RECIPE, (), paths[name])
    groups = parameter_groups()
    assert sum(map(sum, groups)) == measured[name]["parameters"]
    states = state_memory(groups, zero_of(ds_config, OptimizerSection(lr=1e-3)), 2, ACCUMULATION)
    on_host = sum(states.host.values())  # a CPU rank has both in one memory
    assert states.held + on_host == pytest.approx(measured[name]["held"], rel=0.01)
    assert states.peak() + on_host == pytest.approx(measured[name]["peak"], rel=0.05)
