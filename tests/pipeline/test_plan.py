"""What a run costs: memory, messages and time, against figures from elsewhere."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

from pipeline import costs, plan
from pipeline.configuration import resolve
from pipeline.costs import Batch, Zero
from pipeline.hardware import GPUS, find_gpu, peak_flops
from pipeline.recipe import RECIPES, OptimizerSection

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
HIDDEN, HEADS, SEQUENCE, SAMPLES, LAYERS = 128, 4, 64, 2, 3
COMMON = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": 100}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
ARCHITECTURES = {
    "gpt2": {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_positions": SEQUENCE, **NO_DROPOUT},
    "gpt2_fused_gelu": {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_positions": SEQUENCE,
                        "activation_function": "gelu_pytorch_tanh", **NO_DROPOUT},
    "bert": {**COMMON, "intermediate_size": 4 * HIDDEN, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "llama": {**COMMON, "intermediate_size": 3 * HIDDEN},
    "llama_grouped": {**COMMON, "intermediate_size": 3 * HIDDEN, "num_key_value_heads": 2},
}  # fmt: skip
# Elements of GPT-2 small's matrices and vectors (Radford et al. 2019, table 2, first row).
GPT2 = (
    (38_597_376, 786_432, *[1_769_472, 589_824, 2_359_296, 2_359_296] * 12),
    (*[768, 768, 2304, 768, 768, 768, 3072, 768] * 12, 768, 768),
)


def transformers_model(name, dtype=torch.float32, device="cpu", layers=LAYERS):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    values = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False, "vocab_size": 100}
    values |= ARCHITECTURES[name] | {"n_layer" if name.startswith("gpt2") else "num_hidden_layers": layers}
    config = AutoConfig.for_model(name.split("_")[0], **values)
    heads = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    with torch.device(device):
        return heads.from_config(config, dtype=dtype, attn_implementation="sdpa").train(), config


def shape(name):
    return costs.shape_of(*transformers_model(name, device="meta"), 1.0)


def saved_bytes(model, checkpointing):
    """Bytes that autograd keeps of a forward pass, without the parameters and the logits' own loss."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": True})  # whose inputs are saved tensors
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.randint(0, 100, (SAMPLES, SEQUENCE)))
    del output
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_are_within_10_percent_of_what_autograd_keeps(name, dtype):
    model, _ = transformers_model(name, dtype)
    predicted = costs.activation_memory(shape(name), SAMPLES * SEQUENCE, dtype.itemsize, "none")
    assert predicted == pytest.approx(saved_bytes(model, "none"), rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_full_checkpointing_keeps_the_inputs_of_layers_and_makes_one_layer_again(name):
    model, _ = transformers_model(name, layers=24)
    deep, tokens = dataclasses.replace(shape(name), layers=24), SAMPLES * SEQUENCE
    kept = costs.activation_memory(deep, tokens, 4, "full") - costs.layer_activations(deep, 4) * tokens
    assert kept == pytest.approx(saved_bytes(model, "full"), rel=0.1)


def test_a_fused_gpt_block_keeps_the_34_hidden_bytes_a_token_of_the_paper():
    """Korthikanti et al. 2022, equation 2, without attention's scores and their dropout."""
    of_gpt2 = dataclasses.replace(shape("gpt2_fused_gelu"), dropouts=2, heads=0, head_size=0)
    attention = 2 * 4 * HIDDEN  # queries, keys, values, result; their sizes are not in a shape without heads
    assert costs.layer_activations(of_gpt2, 2) + attention == 34 * HIDDEN


def test_states_of_a_large_model_come_to_the_bytes_a_parameter_of_the_zero_paper():
    """Rajbhandari et al. 2020, section 3.1 and figure 1: 16 bytes, of which 12 / W, 14 / W and 16 / W are sharded."""
    groups = ((10_000_000,) * 700, ())[:1]
    numel, ranks = 7_000_000_000, 64
    held = [costs.state_memory(groups, Zero(stage, accumulation_bytes=2), ranks).held / numel for stage in (0, 1, 2)]
    assert held == pytest.approx([16, 4 + 12 / ranks, 2 + 14 / ranks], rel=0.01)
    stage_3 = costs.state_memory(groups, Zero(3, accumulation_bytes=2, reduce_bucket_size=1), ranks)
    assert stage_3.held / numel == pytest.approx(16 / ranks, rel=0.01)


def test_fp32_accumulation_costs_what_ds_configs_readme_states():
    numel, ranks = sum(map(sum, GPT2)), 8
    assert numel == 124_439_808
    for stage, expected in ((1, 8 + 12 / ranks), (2, 2 + 16 / ranks)):
        assert costs.state_memory(GPT2, Zero(stage), ranks).held / numel == pytest.approx(expected, rel=1e-3)


def test_a_rank_touches_the_parameters_that_its_share_cuts():
    generator = random.Random(5)
    for _ in range(200):
        group = [generator.randint(1, 40) for _ in range(generator.randint(1, 12))]
        ranks = generator.randint(1, 9)
        size = costs._partition(group, ranks)
        owner = [index for index, numel in enumerate(group) for _ in range(numel)]  # of each element
        expected = max(sum(group[i] for i in set(owner[start : start + size])) for start in range(0, len(owner), size))
        assert costs._touched_by_a_partition(group, ranks) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_never_grows_with_ranks_and_offload_never_adds_to_the_device(stage):
    peaks = [costs.state_memory(GPT2, Zero(stage), ranks).peak() for ranks in (1, 2, 8, 64, 512)]
    assert peaks == sorted(peaks, reverse=True)
    if stage >= 2:
        offloaded = costs.state_memory(GPT2, Zero(stage, optimizer_device="cpu"), 8)
        assert offloaded.peak() < costs.state_memory(GPT2, Zero(stage), 8).peak()
        assert sum(offloaded.host.values()) > 12 * sum(map(sum, GPT2)) / 8


def gpt2_shape():
    return dataclasses.replace(
        shape("gpt2"), groups=GPT2, layers=12, hidden=768, heads=12, head_size=64, key_value_heads=12,
        intermediate=3072, vocabulary=50257, flops_a_token=8.0e8,
    )  # fmt: skip


def test_bytes_sent_are_those_of_the_zero_paper():
    """Section 7: stage 2 as much as data parallelism where parts go to their owners, stage 3 half as much again."""
    big = dataclasses.replace(gpt2_shape(), groups=((10_000_000,) * 700,))
    zero, ranks = Zero(2, overlap_comm=True, multi_rank_bucket_allreduce=False), 1000
    sent = {
        stage: costs.communication(big, dataclasses.replace(zero, stage=stage), ranks, 1).bytes for stage in (0, 2, 3)
    }
    element = 2 * big.parameters * (ranks - 1) / ranks
    assert sent[0] == pytest.approx(2 * element) and sent[2] == pytest.approx(2 * element)
    # Less what stays from the forward to the backward pass: half of max_reuse_distance.
    assert sent[3] == pytest.approx(3 * element - 2 * 500_000_000 * (ranks - 1) / ranks)
    assert costs.communication(big, zero, 1, 1).bytes == 0
    whole = costs.communication(big, dataclasses.replace(zero, multi_rank_bucket_allreduce=True), ranks, 4)
    assert whole.bytes == pytest.approx((4 * 2 + 1) * element)


def step(zero, ranks=8, samples=512, micro=8, **changes):
    given = {"gpus_per_node": 8, "mfu": 0.45, **changes}
    return costs.step_time(
        gpt2_shape(), zero, Batch(1024), GPUS["H100"], global_batch_size=samples, micro_batch_size=micro,
        world_size=ranks, **given,
    )  # fmt: skip


def test_a_step_takes_its_flops_over_the_cards_share_and_what_is_not_hidden():
    one = step(Zero(2, overlap_comm=True), ranks=1)
    assert one.compute == pytest.approx(8.0e8 * 512 * 1024 / (989e12 * 0.45))
    assert one.exposed_communication == 0
    hidden, exposed = step(Zero(2, overlap_comm=True)), step(Zero(2, overlap_comm=False))
    assert hidden.exposed_communication < exposed.exposed_communication
    assert hidden.total == pytest.approx(hidden.compute + hidden.exposed_communication + hidden.optimizer)
    assert step(Zero(3, overlap_comm=True), ranks=64).total < hidden.total
    assert step(Zero(2, optimizer_device="cpu")).optimizer > 10 * hidden.optimizer


@pytest.mark.parametrize("share", [1, 6, 64, 97])
def test_the_largest_micro_batch_divides_the_share_and_its_successor_does_not_fit(share):
    shape_, zero, batch, budget = gpt2_shape(), Zero(2), Batch(1024), 20e9
    found = costs.largest_micro_batch(shape_, zero, batch, share, 8, budget)
    fits = [n for n in range(1, share + 1)
            if share % n == 0 and costs.peak_memory(shape_, zero, batch, n, 8, share // n) <= budget]  # fmt: skip
    assert found == max(fits)
    assert costs.largest_micro_batch(shape_, zero, batch, share, 8, 1e9) == 0


def test_cards_are_found_by_the_names_of_cuda():
    assert find_gpu("NVIDIA A100-SXM4-40GB").memory == 40e9 and find_gpu("NVIDIA A100-SXM4-80GB").memory == 80e9
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA L40") is None  # another card than L4 and L40S


def run(capsys, *flags):
    status = plan.main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_plan_says_what_the_run_is_and_writes_a_ds_config_that_pretrain_takes(capsys, tmp_path):
    path = tmp_path / "chosen.json"
    recipe = RECIPES / "gpt2-124m.yaml"
    status, out, _ = run(capsys, "--recipe", recipe, "--deepspeed_config", DS_CONFIGS / "zero2.json", "--gpu", "H100",
                         "--nodes", 2, "--gpus_per_node", 8, "--write", path)  # fmt: skip
    assert status == 0
    assert "gpt2, 124.4 M parameters, 0.799 GFLOPs a token" in out  # 6 x 123.7 M + 6 x 12 x 768 x 1024
    assert "compute-optimal: 2.5 G, 20 a parameter" in out
    assert all(f"\n{scale:,} " in out for scale in plan.SCALES)
    recipe, written = resolve(recipe, (), path)
    micro = written["train_micro_batch_size_per_gpu"]
    assert recipe.training.global_batch_size % (16 * micro) == 0
    assert written["bf16"] == {"enabled": True} and written["zero_optimization"]["stage"] > 0


def test_a_model_that_no_stage_holds_is_offloaded_or_refused_with_a_way_out(capsys):
    common = ("--recipe", RECIPES / "gpt-7b.yaml", "--deepspeed_config", DS_CONFIGS / "zero3.json")
    status, out, _ = run(capsys, *common, "--gpu", "h100", "--gpus_per_node", 1, "--training.global_batch_size", 32)
    assert status == 0 and ", states cpu" in out[out.index("chosen ") :]
    assert json.loads(out[out.index("\n{") :])["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    status, out, _ = run(capsys, *common, "--gpu", "l4", "--gpus_per_node", 1, "--data.sequence_length", 2048,
                         "--training.global_batch_size", 32, "--model.config.num_hidden_layers", 200)  # fmt: skip
    assert status == 1 and "nothing fits" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h20"], "error: --gpu is 'h20', which the table has not; did you mean h200?"),
        (["--gpu", "h200", "--nodes", "3"], "512, not a multiple of the 24 GPUs (3 nodes x 8); take 528 samples"),
        (["--gpu", "h200", "--training.max_step", "3"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    common = ("--recipe", RECIPES / "gpt2-124m.yaml", "--deepspeed_config", DS_CONFIGS / "zero2.json")
    status, _, err = run(capsys, *common, *flags)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and message in line


def test_offloaded_and_sharded_settings_are_read_from_the_ds_config():
    _, ds_config = resolve(RECIPES / "demo-gpt.yaml", (), DS_CONFIGS / "zero3_offload.json")
    zero = plan.zero_of(ds_config, OptimizerSection(type="Lion", lr=1e-3))
    assert (zero.stage, zero.optimizer_device, zero.parameter_device, zero.moment_bytes) == (3, "cpu", "cpu", 4)
    assert zero.accumulation_bytes == 4 and zero.communication_bytes == 2 and zero.reduce_bucket_size == 50_000_000
    assert zero.overlap_comm and math.isclose(zero.max_live_parameters, 1e9)
    averaging = plan.zero_of(ds_config, OptimizerSection(type="Lion", lr=1e-3, ema_decay=0.99))
    assert averaging.moment_bytes == 8


def test_padding_of_the_vocabulary_counts_in_memory_alone():
    """50,257 words are 50,304 rows of 768."""
    recipe, _ = resolve(RECIPES / "gpt2-124m.yaml", (), DS_CONFIGS / "zero2.json")
    whole, _ = resolve(
        RECIPES / "gpt2-124m.yaml", (("model.pad_vocab_to_multiple_of", "1"),), DS_CONFIGS / "zero2.json"
    )
    (padded, parameters, _), (plain, *_) = plan.measure(recipe), plan.measure(whole)
    assert padded.vocabulary == 50304 and plain.vocabulary == 50257
    assert padded.parameters - plain.parameters == 47 * 768 and parameters == plain.parameters
    assert padded.flops_a_token == plain.flops_a_token


def test_an_optimizer_that_only_stage_0_takes_is_planned_there(capsys):
    common = ("--recipe", RECIPES / "bert-base.yaml", "--deepspeed_config", DS_CONFIGS / "zero0.json")
    status, out, _ = run(capsys, *common, "--gpu", "a100", "--optimizer.type", "Lamb")
    assert status == 0 and "chosen    ZeRO 0, micro-batch" in out


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    common = ("--deepspeed_config", DS_CONFIGS / "zero2.json", "--gpu", "h100")
    status, _, err = run(capsys, *common, "--write", tmp_path)
    assert status == 1 and f"error: --write {tmp_path}: " in err and "give another path" in err
