"""The recipe and the ds_config agree on what is trained, or one line names both files, both keys and both values."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline import ds_config
from pipeline.batch import BatchPlan, plan_batches
from pipeline.ds_config import (
    check_average,
    check_carried_out,
    check_histograms,
    check_ranks,
    complete_ds_config,
    compute_precision,
    merge_into_recipe,
    offload_device,
    precision,
    zero_stage,
)
from pipeline.ds_config_keys import check_ds_config_keys, top_level_schema
from pipeline.recipe import check_recipe

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))

RECIPE: dict[str, Any] = {
    "objective": "causal",
    "model": {"config": "demo-gpt"},
    "data": {"shards": "s", "tokenizer": "t", "sequence_length": 256},
    "training": {"global_batch_size": 16, "max_steps": 150},
    "optimizer": {
        "type": "AdamW",
        "lr": 2e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "gradient_clipping": 1.0,
    },
    "schedule": {"type": "cosine", "warmup_steps": 20},
}
# The same, as a ds_config says it.
DS_CONFIG: dict[str, Any] = {
    "train_batch_size": 16,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 20, "total_num_steps": 150, "warmup_type": "linear", "cos_min_ratio": 0},
    },
    "zero_optimization": {"stage": 2},
}


def merge(recipe: dict[str, Any], ds_config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return merge_into_recipe(recipe, ds_config, recipe_source="r.yaml", config_source="x.json")


def fault_of(recipe: dict[str, Any], ds_config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        merge(recipe, ds_config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_agreeing_values_pass_and_leave_the_ds_config() -> None:
    assert merge(RECIPE, DS_CONFIG) == (RECIPE, {"zero_optimization": {"stage": 2}})


def test_merging_changes_neither_argument() -> None:
    recipe, ds_config = {"optimizer": {"lr": 2e-3}}, copy.deepcopy(DS_CONFIG)
    merge(recipe, ds_config)
    assert recipe == {"optimizer": {"lr": 2e-3}}
    assert ds_config == DS_CONFIG


@pytest.mark.parametrize("text", ["2e-3", "0.002", 2e-3], ids=str)
def test_a_number_agrees_however_the_recipe_writes_it(text: object) -> None:
    recipe = {"optimizer": {"lr": text}}  # YAML 1.1 reads 2e-3 as text
    merged, _ = merge(recipe, {"optimizer": {"params": {"lr": 2e-3}}})
    assert merged["optimizer"] == {"lr": text}


def test_what_the_recipe_leaves_out_is_taken_from_the_ds_config() -> None:
    partial = {key: RECIPE[key] for key in ("objective", "model", "data")}
    merged, rest = merge(partial, DS_CONFIG)
    assert rest == {"zero_optimization": {"stage": 2}}
    recipe = check_recipe(merged, "r.yaml")
    assert recipe == check_recipe(RECIPE, "r.yaml")


@pytest.mark.parametrize(
    ("theirs", "ours"), [("WarmupLR", "constant"), ("WarmupDecayLR", "linear"), ("WarmupCosineLR", "cosine")]
)
def test_a_scheduler_of_deepspeed_is_taken_over_by_its_shape(theirs: str, ours: str) -> None:
    params = {"warmup_max_lr": 1e-3, "warmup_num_steps": 7, "warmup_type": "linear"}
    if ours == "cosine":
        params["cos_min_ratio"] = 0
    scheduler = {"type": theirs, "params": params}
    merged, _ = merge({}, {"scheduler": scheduler})
    assert merged == {"schedule": {"type": ours, "warmup_steps": 7}, "optimizer": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("path", "value", "field", "ours"),
    [
        ("train_batch_size", 32, "training.global_batch_size", 16),
        ("gradient_clipping", 0.5, "optimizer.gradient_clipping", 1.0),
        ("optimizer.type", "Lamb", "optimizer.type", "AdamW"),
        ("optimizer.params.lr", 1e-3, "optimizer.lr", 2e-3),
        ("optimizer.params.betas", [0.9, 0.999], "optimizer.betas", [0.9, 0.95]),
        ("optimizer.params.eps", 1e-6, "optimizer.eps", 1e-8),
        ("optimizer.params.weight_decay", 0.0, "optimizer.weight_decay", 0.1),
        ("scheduler.params.warmup_max_lr", 1e-3, "optimizer.lr", 2e-3),
        ("scheduler.params.warmup_num_steps", 10, "schedule.warmup_steps", 20),
        ("scheduler.params.total_num_steps", 151, "training.max_steps", 150),
    ],
)
def test_a_contradiction_names_both_files_keys_and_values(path: str, value: object, field: str, ours: object) -> None:
    stated: Any = value
    for part in reversed(path.split(".")):
        stated = {part: stated}
    assert fault_of(RECIPE, stated) == (
        f"x.json: {path} is {value!r}, but {field} is {ours!r} in r.yaml;"
        " the recipe decides it: leave the key out of the ds_config or make them equal"
    )


def test_another_schedule_is_a_contradiction_in_the_recipes_words() -> None:
    assert fault_of(RECIPE, {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}}}) == (
        "x.json: scheduler.type is 'linear', but schedule.type is 'cosine' in r.yaml;"
        " the recipe decides it: leave the key out of the ds_config or make them equal"
    )


@pytest.mark.parametrize(
    ("theirs", "params", "missing"),
    [
        ("WarmupDecayLR", {}, "warmup_type"),
        ("WarmupDecayLR", {"warmup_type": "log"}, "warmup_type"),
        ("WarmupCosineLR", {"warmup_type": "linear"}, "cos_min_ratio"),
        ("WarmupCosineLR", {"warmup_type": "linear", "cos_min_ratio": 0.1}, "cos_min_ratio"),
    ],
)
def test_what_deepspeeds_schedulers_leave_to_their_defaults_has_to_be_stated(theirs, params, missing) -> None:
    """Their warm-up is logarithmic, and their cosine ends at 1e-4 of the peak, unless told otherwise."""
    fault = fault_of({}, {"scheduler": {"type": theirs, "params": params}})
    assert fault.startswith(f"x.json: scheduler.params.{missing} has to be ")


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum', but training here needs 'mean'"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is False, but training here needs"),
        ({"tensor_parallel": {"autotp_size": 2}}, '"tensor_parallel" is not carried out'),
        ({"compile": {"deepcompile": True}}, '"compile" is not carried out'),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            '"activation_checkpointing" is not carried out by pretrain.py: transformers\' layers do not call it',
        ),
    ],
)
def test_what_the_loop_cannot_do_justice_to_is_refused(stated: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_carried_out(stated, "x.json")
    assert str(caught.value).startswith(f"x.json: {words}")
    assert str(caught.value).endswith("leave it out")


def test_every_key_that_is_refused_is_one_that_deepspeed_knows() -> None:
    """A name that DeepSpeed drops would stay in the table for ever."""
    assert {*ds_config._FIXED, *ds_config._NOT_CARRIED_OUT} <= set(top_level_schema())


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "bf16 and torch_autocast are two ways to one thing; enable one",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype is 'float16', expected \"bfloat16\" (in float16 DeepSpeed clips gradients that are"
            " still scaled)",
        ),
        (
            {"torch_autocast": {"enabled": True}},
            'torch_autocast.dtype is None, expected "bfloat16" (in float16 DeepSpeed clips gradients that are still'
            " scaled)",
        ),
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size does nothing at stage 2; take stage 3, or leave it out",
        ),
        (
            {"zero_optimization": {"stage": 1, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients does nothing at stage 1; take stage 3, or leave it out",
        ),
    ],
)
def test_what_deepspeed_would_pass_over_or_get_wrong_is_refused(stated: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_carried_out(stated, "x.json")
    assert str(caught.value) == f"x.json: {words}"


def test_the_defaults_of_these_keys_are_no_mistake() -> None:
    off = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    check_carried_out({"bf16": {"enabled": True}, "torch_autocast": {"enabled": False}}, "x.json")
    check_carried_out({"zero_optimization": {"stage": 2, **off}}, "x.json")
    check_ranks({"zero_optimization": {"stage": 3, **off}}, "x.json", device="cpu", world_size=3)


# What ranks cannot carry out of the shipped files: CPU ranks, on a machine without /mnt/nvme.
REFUSED = {
    "zero2_fp16": "fp16 needs a GPU; CPU ranks take a bf16 or fp32 ds_config",
    "zeropp": "zero_optimization.zero_quantized_weights needs a GPU; CPU ranks take ds_configs/zero3.json",
    "zero3_offload_nvme": "zero_optimization.offload_optimizer.nvme_path is '/mnt/nvme', which is no folder that can"
    " be written to; give one on this machine's NVMe drive",
}


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_what_cpu_ranks_cannot_carry_out_is_said_before_anything_is_built(path: Path) -> None:
    raw = json.loads(path.read_text())
    check_carried_out(raw, path.name)
    if path.stem not in REFUSED:
        check_ranks(raw, path.name, device="cpu", world_size=2)
        return
    with pytest.raises(UserError) as caught:
        check_ranks(raw, path.name, device="cpu", world_size=2)
    assert str(caught.value) == f"{path.name}: {REFUSED[path.stem]}"


def test_a_folder_on_a_drive_is_all_that_nvme_offload_asks_of_the_config(tmp_path: Path) -> None:
    raw = json.loads((DS_CONFIGS[0].parent / "zero3_offload_nvme.json").read_text())
    for what in ("offload_optimizer", "offload_param"):
        raw["zero_optimization"][what]["nvme_path"] = str(tmp_path)
    check_ranks(raw, "x.json", device="cpu", world_size=2)


def test_the_ranks_of_a_node_have_to_divide_all_ranks() -> None:
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    check_ranks(raw, "x.json", device="cuda", world_size=4)  # DeepSpeed takes all of them
    check_ranks(raw, "x.json", device="cuda", world_size=16)
    with pytest.raises(UserError, match="zero_hpz_partition_size is 8, which does not divide the 12 ranks; give"):
        check_ranks(raw, "x.json", device="cuda", world_size=12)


def test_mics_is_refused_in_deepspeeds_words() -> None:
    with pytest.raises(UserError, match=r'"zero_optimization\.mics_shard_size" was removed from DeepSpeed: MiCS'):
        check_ds_config_keys({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "x.json")


def test_deprecated_ways_to_say_stage_and_offload_are_understood() -> None:
    assert zero_stage({"zero_optimization": True}) == 1
    assert zero_stage({}) == 0 and zero_stage({"zero_optimization": False}) == 0
    assert offload_device({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "optimizer") == "cpu"
    assert offload_device({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "optimizer") == (
        "none"
    )


@pytest.mark.parametrize(
    ("section", "allowed"),
    [
        ({"stage": 2}, True),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, True),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, False),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, False),
    ],
)
def test_an_average_of_the_weights_needs_states_that_can_be_reached(section: dict[str, Any], allowed: bool) -> None:
    config = {"zero_optimization": section}
    check_average(config, None)
    if allowed:
        check_average(config, 0.999)
        return
    with pytest.raises(UserError, match=r"optimizer\.ema_decay is 0\.999, .* offload_optimizer"):
        check_average(config, 0.999)


def test_histograms_are_not_read_from_a_drive() -> None:
    on_drive = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
    check_histograms(on_drive, 0)
    check_histograms({"zero_optimization": {"stage": 3}}, 100)
    with pytest.raises(UserError, match=r"evaluation\.histograms_every_steps is 100, .* NVMe"):
        check_histograms(on_drive, 100)


def test_a_scheduler_that_the_recipe_has_not_is_refused() -> None:
    assert fault_of({}, {"scheduler": {"type": "OneCycle"}}) == (
        "x.json: scheduler.type is 'OneCycle', expected one of WarmupLR, WarmupDecayLR, WarmupCosineLR;"
        " or state the schedule in the recipe"
    )


def test_a_number_of_steps_beside_a_number_of_tokens_names_both() -> None:
    recipe = {"training": {"global_batch_size": 16, "max_tokens": 1_000_000}}
    assert fault_of(recipe, {"scheduler": {"params": {"total_num_steps": 150}}}) == (
        "x.json: scheduler.params.total_num_steps is 150, but the run's length is training.max_tokens 1000000 in"
        " r.yaml; the recipe decides it: leave the key out"
    )


@pytest.mark.parametrize(
    ("stated", "key"),
    [
        ({"optimizer": {"params": {"bias_correction": False}}}, "optimizer.params.bias_correction"),
        ({"optimizer": {"legacy_fusion": True}}, "optimizer.legacy_fusion"),
        ({"scheduler": {"params": {"cos_min_ratio": 0.1}}}, "scheduler.params.cos_min_ratio"),
    ],
)
def test_what_the_recipe_cannot_express_is_refused_by_name(stated: dict[str, Any], key: str) -> None:
    section = key.split(".")[0]
    assert fault_of(RECIPE, stated) == (
        f"x.json: {key} cannot be taken over; state the {section} in the recipe and leave it out of the ds_config"
    )


def test_the_recipes_numbers_replace_what_is_automatic() -> None:
    recipe = check_recipe(RECIPE, "r.yaml")
    found = complete_ds_config(
        {"train_micro_batch_size_per_gpu": "auto", "steps_per_print": 5}, recipe, BatchPlan(16, 4, 2, 2)
    )
    assert found == {
        "steps_per_print": 5,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_reads_the_completed_config_as_we_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = check_recipe(RECIPE, "r.yaml")
    raw = json.loads(path.read_text())
    batches = plan_batches(
        raw,
        source=str(path),
        global_batch_size=recipe.training.global_batch_size,
        world_size=1,
        sequence_length=recipe.data.sequence_length,
        device="cpu",
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    theirs = DeepSpeedConfig(complete_ds_config(raw, recipe, batches))
    assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == (
        batches.global_batch_size,
        batches.micro_batch_size,
        batches.gradient_accumulation_steps,
    )
    assert theirs.gradient_clipping == recipe.optimizer.gradient_clipping
    assert theirs.zero_optimization_stage == zero_stage(raw)
    assert precision(raw) == (
        "bf16" if theirs.bfloat16_config.enabled else "fp16" if theirs.float16_config.enabled else "fp32"
    )
    assert compute_precision(raw) == ("bf16" if theirs.torch_autocast_enabled else precision(raw))
    offload = theirs.zero_config.offload_optimizer
    assert offload_device(raw, "optimizer") == ("none" if offload is None else offload.device)
    assert theirs.optimizer_name is None
    assert theirs.scheduler_name is None
