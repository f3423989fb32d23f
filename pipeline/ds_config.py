"""The recipe and the ds_config agree, or the run does not start.

A ds_config may state what belongs to the recipe (batch size, optimizer, scheduler, clipping) if the recipe says the
same or leaves it out; what the recipe leaves out is taken from there.
"""

import copy
from collections.abc import Mapping
from typing import Any

from data_prep.errors import UserError
from pipeline.batch import BatchPlan
from pipeline.recipe import Recipe

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
# Sections that need more than DeepSpeed's engine gets from the loop so far: they would do nothing, or do harm.
_NOT_CARRIED_OUT = (
    "autotuning",
    "checkpoint",
    "compile",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "hybrid_engine",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "weight_quantization",
)


def check_carried_out(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a key that DeepSpeed knows but that a run here would not do justice to."""
    for key, needed in _FIXED.items():
        if key in config and config[key] != needed:
            raise UserError(f"{source}: {key} is {config[key]!r}, but training here needs {needed!r}; leave it out")
    for key in _NOT_CARRIED_OUT:
        if key in config:
            raise UserError(f'{source}: "{key}" is not carried out by pretrain.py so far; leave it out')


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
    """The configuration that DeepSpeed gets: the ds_config with the recipe's numbers filled in."""
    return {
        "steps_per_print": 1 << 62,  # the run's own log says it
        **config,
        "train_batch_size": batches.global_batch_size,
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.gradient_accumulation_steps,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
    }


def precision(config: Mapping[str, Any]) -> str:
    """The precision of the weights that the forward pass uses: "bf16", "fp16" or "fp32"."""
    for name in ("bf16", "fp16"):
        if (config.get(name) or {}).get("enabled"):
            return name
    return "fp32"


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


def describe(config: Mapping[str, Any], recipe: Recipe) -> str:
    """Stage, precision and optimizer in words."""
    device = offload_device(config, "optimizer")
    offloaded = "" if device == "none" else f" offloaded to {device}"
    return f"ZeRO {zero_stage(config)}, {precision(config)}, {recipe.optimizer.type}{offloaded}"
