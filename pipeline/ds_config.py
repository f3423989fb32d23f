"""The recipe and the ds_config agree, or the run does not start.

A ds_config may state what belongs to the recipe (batch size, optimizer, scheduler, clipping) if the recipe says the
same or leaves it out; what the recipe leaves out is taken from there.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

from data_prep.errors import UserError
from pipeline.batch import BatchPlan
from pipeline.recipe import OptimizerSection, Recipe

# ds_config key -> recipe field that holds the same thing.
_SHARED = {
    "train_batch_size": "training.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer.type": "optimizer.type",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "scheduler.type": "schedule.type",
    "scheduler.params.warmup_max_lr": "optimizer.lr",
    "scheduler.params.warmup_num_steps": "schedule.warmup_steps",
    "scheduler.params.total_num_steps": "training.max_steps",
}
# DeepSpeed's schedulers (deepspeed/runtime/lr_schedules.py) by the shape that they share with ours.
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# What the loop rests on: other values would change the gradients without a word.
_FIXED = {"managed_gradient_accumulation": True, "gradient_allreduce_op": "mean"}
# Sections that would do nothing here, or do harm, and why.
_NOT_CARRIED_OUT = {
    "activation_checkpointing": "transformers' layers do not call it; see model.activation_checkpointing in the recipe",
    "autotuning": "it starts runs of its own, without the recipe",
    "checkpoint": "pipeline/checkpoint.py writes whole folders with checksums",
    "compile": "it is DeepCompile, which needs GPUs and was not tried",
    "data_efficiency": "the recipe's data and curriculum sections say which tokens are seen when",
    "datastates_ckpt": "pipeline/checkpoint.py writes whole folders with checksums",
    "expert_parallel": "the experts of a layer are not spread over ranks",
    "hybrid_engine": "it is for generation between steps",
    "pipeline": "models are not cut into stages",
    "sequence_parallel_size": "every rank has whole rows, and Ulysses drops the masks that keep documents apart",
    "tensor_parallel": "every rank has rows of its own, where the ranks of such a group need the same",
    "weight_quantization": "it is for inference",
}
# ZeRO++ (Wang et al. 2023): read at stage 3 only; the latter three with CUDA kernels.
_HIERARCHICAL = "zero_hpz_partition_size"
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_carried_out(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a key that DeepSpeed knows but that a run here would not do justice to."""
    for key, needed in _FIXED.items():
        if key in config and config[key] != needed:
            raise UserError(f"{source}: {key} is {config[key]!r}, but training here needs {needed!r}; leave it out")
    for key, why in _NOT_CARRIED_OUT.items():
        if key in config:
            raise UserError(f'{source}: "{key}" is not carried out by pretrain.py: {why}; leave it out')
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled"):
        if precision(config) != "fp32":
            raise UserError(f"{source}: {precision(config)} and torch_autocast are two ways to one thing; enable one")
        if autocast.get("dtype") not in ("bfloat16", "bf16", "torch.bfloat16"):
            raise UserError(
                f'{source}: torch_autocast.dtype is {autocast.get("dtype")!r}, expected "bfloat16" (in float16'
                " DeepSpeed clips gradients that are still scaled)"
            )
    zero = _zero_section(config)
    for key in (_HIERARCHICAL, *_QUANTIZED):
        if int(zero.get(key) or 0) > (key == _HIERARCHICAL) and zero_stage(config) != 3:
            raise UserError(
                f"{source}: zero_optimization.{key} does nothing at stage {zero_stage(config)}; take stage 3, or leave"
                " it out"
            )


def check_ranks(config: Mapping[str, Any], source: str, *, device: str, world_size: int) -> None:
    """Raises UserError for what ranks on `device` ("cpu", "cuda"), or `world_size` of them, cannot carry out."""
    zero = _zero_section(config)
    if device == "cpu":
        if precision(config) == "fp16":
            raise UserError(f"{source}: fp16 needs a GPU; CPU ranks take a bf16 or fp32 ds_config")
        for key in _QUANTIZED:
            if zero.get(key):
                raise UserError(f"{source}: zero_optimization.{key} needs a GPU; CPU ranks take ds_configs/zero3.json")
    group = min(zero.get(_HIERARCHICAL, 1) or 1, world_size)
    if world_size % group:
        raise UserError(
            f"{source}: zero_optimization.{_HIERARCHICAL} is {group}, which does not divide the {world_size} ranks;"
            " give the number of ranks of one node"
        )
    for what in ("optimizer", "param"):
        if offload_device(config, what) == "nvme":
            path = zero[f"offload_{what}"].get("nvme_path")
            if path is None or not os.access(path, os.W_OK | os.X_OK):
                raise UserError(
                    f"{source}: zero_optimization.offload_{what}.nvme_path is {path!r}, which is no folder that can be"
                    " written to; give one on this machine's NVMe drive"
                )


def _leaves(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}"
        found.update(_leaves(value, name) if isinstance(value, dict) else {name: value})
    return found


def merge_into_recipe(
    raw: dict[str, Any], config: dict[str, Any], *, recipe_source: str, config_source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moves what the ds_config states of the recipe's matters into the (unchecked) recipe.

    Returns both without touching the arguments. Raises UserError where the two contradict each other, or where the
    ds_config's optimizer or scheduler states something that the recipe cannot express.
    """
    raw, config = copy.deepcopy(raw), copy.deepcopy(config)
    stated: dict[str, Any] = {key: config[key] for key in ("train_batch_size", "gradient_clipping") if key in config}
    for section in ("optimizer", "scheduler"):
        stated.update(_leaves(config.get(section) or {}, section))
    for key, value in stated.items():
        if "scheduler.type" in stated and key in ("scheduler.params.warmup_type", "scheduler.params.cos_min_ratio"):
            continue  # compared where the type is
        if key not in _SHARED:
            raise UserError(
                f"{config_source}: {key} cannot be taken over; state the {key.split('.')[0]} in the recipe and leave it"
                " out of the ds_config"
            )
        if key == "optimizer.type" and str(value).lower() == "muon":
            raise UserError(
                f"{config_source}: optimizer.type is {value!r}, whose learning rate has another scale in DeepSpeed (the"
                " recipe's is AdamW's); state the optimizer in the recipe and leave it out of the ds_config"
            )
        if key == "scheduler.type":
            if value not in _SCHEDULES:
                raise UserError(
                    f"{config_source}: scheduler.type is {value!r}, expected one of {', '.join(_SCHEDULES)};"
                    " or state the schedule in the recipe"
                )
            # DeepSpeed's defaults are a logarithmic warm-up and a cosine that ends above 0; ours is what is stated.
            params = (config["scheduler"].get("params") or {}).items()
            wanted = {"warmup_type": "linear"} | ({"cos_min_ratio": 0} if value == "WarmupCosineLR" else {})
            for name, needed in wanted.items():
                if (name, needed) not in params:
                    raise UserError(
                        f"{config_source}: scheduler.params.{name} has to be {needed!r}, stated, to be taken over;"
                        " or state the schedule in the recipe and leave it out of the ds_config"
                    )
            value = _SCHEDULES[value]
        section, _, field = _SHARED[key].partition(".")
        known = raw.setdefault(section, {})
        if field == "max_steps" and "max_tokens" in known:
            raise UserError(
                f"{config_source}: {key} is {value!r}, but the run's length is training.max_tokens"
                f" {known['max_tokens']!r} in {recipe_source}; the recipe decides it: leave the key out"
            )
        if field in known and not _equal(known[field], value):
            raise UserError(
                f"{config_source}: {key} is {value!r}, but {section}.{field} is {known[field]!r} in {recipe_source};"
                " the recipe decides it: leave the key out of the ds_config or make them equal"
            )
        known.setdefault(field, value)
    for key in ("train_batch_size", "gradient_clipping", "optimizer", "scheduler"):
        config.pop(key, None)
    return raw, config


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    try:
        return float(left) == float(right)  # YAML 1.1 reads 6e-4 as text
    except (TypeError, ValueError):
        return str(left).lower() == str(right).lower()


def complete_ds_config(config: dict[str, Any], recipe: Recipe, batches: BatchPlan) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: the ds_config with the recipe's numbers filled in.

    Raises UserError as `fill_in` and `check_histograms` do.
    """
    check_histograms(config, recipe.evaluation.histograms_every_steps)
    return fill_in(config, recipe.optimizer, batches)


def fill_in(config: dict[str, Any], optimizer: OptimizerSection, batches: BatchPlan) -> dict[str, Any]:
    """The ds_config with the numbers of the batches and the clipping; raises UserError as `check_optimizer` and
    `check_average` do."""
    check_optimizer(config, optimizer.type)
    check_average(config, optimizer.ema_decay)
    # DeepSpeed knows AdamW's classes; that ours may see what ZeRO keeps is checked above.
    ours = {"zero_allow_untested_optimizer": True} if optimizer.type != "AdamW" else {}
    return {
        "steps_per_print": 1 << 62,  # the run's own log says it
        **config,
        **ours,
        "train_batch_size": batches.global_batch_size,
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.gradient_accumulation_steps,
        "gradient_clipping": optimizer.gradient_clipping,
    }


TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's name for each precision."""


def precision(config: Mapping[str, Any]) -> str:
    """The precision of the weights that the forward pass reads: "bf16", "fp16" or "fp32"."""
    for name in ("bf16", "fp16"):
        if (config.get(name) or {}).get("enabled"):
            return name
    return "fp32"


def compute_precision(config: Mapping[str, Any]) -> str:
    """The precision of matrix products and attention: that of the weights, or autocast's."""
    return "bf16" if (config.get("torch_autocast") or {}).get("enabled") else precision(config)


def _zero_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("zero_optimization") or {}
    return {"stage": 1} if section is True else section  # deprecated: true is stage 1


def zero_stage(config: Mapping[str, Any]) -> int:
    return int(_zero_section(config).get("stage", 0))


def offload_device(config: Mapping[str, Any], what: str) -> str:
    """Where the states ("optimizer") or weights ("param") are kept: "none" (with the model), "cpu" or "nvme"."""
    section = _zero_section(config)
    if zero_stage(config) == 0:
        return "none"
    offload = section.get(f"offload_{what}")
    if isinstance(offload, Mapping):
        return str(offload.get("device", "none"))
    deprecated = "cpu_offload" if what == "optimizer" else "cpu_offload_param"
    return "cpu" if section.get(deprecated) else "none"


def check_optimizer(config: Mapping[str, Any], optimizer: str) -> None:
    """Raises UserError where the optimizer, by its type, cannot do its work on what the ds_config has ZeRO keep."""
    stage, device = zero_stage(config), offload_device(config, "optimizer")
    if optimizer == "Lamb" and stage > 0:
        raise UserError(
            f"optimizer.type is Lamb, whose steps need the norms of whole weights, but ZeRO stage {stage} keeps slices;"
            " take a ds_config of stage 0 (ds_configs/zero0.json), or AdamW, Lion or Muon"
        )
    if optimizer != "AdamW" and device != "none":
        raise UserError(
            f"optimizer.type is {optimizer}, whose states stay on the device, but the ds_config offloads them to"
            f" {device} (offload_optimizer); take a ds_config without it, or AdamW"
        )
    for key in ("round_robin_gradients", "parameter_alignment"):
        if optimizer == "Muon" and stage in (1, 2) and _zero_section(config).get(key):
            raise UserError(
                f"optimizer.type is Muon, which finds its matrices where ZeRO puts them without"
                f" zero_optimization.{key}; leave that key out of the ds_config, or take AdamW"
            )


def check_histograms(config: Mapping[str, Any], every_steps: int) -> None:
    """Raises UserError where the weights whose histograms are asked for are on a drive when they are to be read."""
    if every_steps and "nvme" in (offload_device(config, "optimizer"), offload_device(config, "param")):
        raise UserError(
            f"evaluation.histograms_every_steps is {every_steps}, but the ds_config keeps weights on NVMe, from where"
            " they are not read for it; take 0, or a ds_config that offloads to cpu"
        )


def check_average(config: Mapping[str, Any], ema_decay: float | None) -> None:
    """Raises UserError where the average of the weights cannot be kept with what ZeRO keeps of the optimizer.

    DeepSpeed's swapper moves the states it knows to NVMe; below a ratio of 1 a second optimizer updates the rest.
    """
    device = offload_device(config, "optimizer")
    ratio = (_zero_section(config).get("offload_optimizer") or {}).get("ratio", 1.0)
    if ema_decay is not None and (device == "nvme" or ratio < 1):
        raise UserError(
            f"optimizer.ema_decay is {ema_decay}, but the ds_config's offload_optimizer (device {device}, ratio"
            f" {ratio:g}) keeps states where the average cannot be kept; take device cpu with ratio 1, none, or leave"
            " ema_decay out"
        )


def describe(config: Mapping[str, Any], optimizer: str) -> str:
    """Stage, precision and optimizer (by its type) in words."""
    device = offload_device(config, "optimizer")
    offloaded = "" if device == "none" else f" offloaded to {device}"
    weights, products = precision(config), compute_precision(config)
    autocast = "" if weights == products else f" with {products} autocast"
    return f"ZeRO {zero_stage(config)}, {weights}{autocast}, {optimizer}{offloaded}"
