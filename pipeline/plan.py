"""`python -m pipeline.plan`: what a run will hold, send and take, before a GPU is paid for."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import durable
from data_prep.encoding import SpecialTokens, TokenizerInfo, load_tokenizer_info
from data_prep.errors import UserError, exit_status, nearest
from pipeline import costs
from pipeline.arguments import add_files, parse_arguments
from pipeline.costs import Batch, Communication, ModelShape, StateMemory, StepTime, Zero
from pipeline.hardware import GPUS, Gpu, find_gpu

if TYPE_CHECKING:
    from pipeline.batch import BatchPlan
    from pipeline.recipe import OptimizerSection, Recipe

EXAMPLES = """\
examples:
  python -m pipeline.plan --recipe pipeline/recipes/gpt2-1.5b.yaml --deepspeed_config ds_configs/zero2.json \\
      --nodes 2 --gpus_per_node 8 --gpu h200
  python -m pipeline.plan --recipe my.yaml --deepspeed_config ds_configs/zero3.json --gpus_per_node 4 --gpu a100 \\
      --training.global_batch_size 256 --write ds_configs/mine.json
"""
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
DEFAULT_MFU = 0.45
# The estimate is no better than this, and the work of stage 3's hooks on the host is not in it.
CLOSE = 1.1
_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
_GPU_NAMES = {name.lower().replace(" ", "-"): name for name in GPUS}
# Stages 1 to 3 with what can be kept outside the GPU, as (stage, optimizer states, weights).
_WAYS = (
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "cpu"),
    (3, "nvme", "nvme"),
)


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    gpus_per_node: int
    world_size: int


@dataclass(frozen=True)
class Way:
    """One way to carry a step out. micro_batch_size is 0 where not even one sample fits; then `time` is None.

    least: bytes of the device with a micro-batch of one sample.
    """

    zero: Zero
    states: StateMemory
    least: int
    micro_batch_size: int
    accumulation_steps: int
    communication: Communication | None
    time: StepTime | None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan",
        description="Memory, communication, time and cost of a run, and the ds_config to take; without a GPU or data."
        " Fields of the recipe are overridden as for pretrain.py: --training.global_batch_size 256.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_files(parser, "precision, buckets and stage to start from (ds_configs/)")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument(
        "--gpus_per_node", type=_count, default=8, metavar="G", help="GPUs of each, a rank a GPU (default: %(default)s)"
    )
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"the card: {', '.join(sorted(_GPU_NAMES))}")
    parser.add_argument(
        "--mfu",
        type=_share,
        default=DEFAULT_MFU,
        metavar="F",
        help="share of the card's peak that forward and backward reach, alone (default: %(default)s)",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the ds_config that the plan chooses")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and at most 1")
    return value


def card(name: str) -> tuple[str, Gpu]:
    """The card of --gpu, any case; raises UserError for one that is not in the table."""
    key = name.lower().replace(" ", "-")
    if key not in _GPU_NAMES:
        raise UserError(f"--gpu is {name!r}, which the table has not; {nearest(key, sorted(_GPU_NAMES))}")
    return _GPU_NAMES[key], GPUS[_GPU_NAMES[key]]


def zero_of(ds_config: Mapping[str, Any], optimizer: "OptimizerSection") -> Zero:
    """What memory and messages follow from in a ds_config, with DeepSpeed's defaults for what it leaves out.

    optimizer: the recipe's, whose states are costs.MOMENTS and the average of the weights.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipeline.ds_config import offload_device, precision, zero_stage

    section = ds_config.get("zero_optimization") or {}
    found = DeepSpeedZeroConfig(**section) if isinstance(section, dict) else DeepSpeedZeroConfig(stage=int(section))
    weight = costs.WEIGHT_BYTES[precision(ds_config)]
    accumulated = (ds_config.get("data_types") or {}).get("grad_accum_dtype")
    sent = str(ds_config.get("communication_data_type"))
    buffers, parameter_buffers = found.offload_optimizer, found.offload_param
    return Zero(
        stage=zero_stage(ds_config),
        precision=precision(ds_config),
        accumulation_bytes=_DTYPE_BYTES[accumulated] if accumulated else weight,
        communication_bytes=_DTYPE_BYTES.get(sent, weight),
        moment_bytes=costs.FP32 * (costs.MOMENTS[optimizer.type] + (optimizer.ema_decay is not None)),
        optimizer_device=offload_device(ds_config, "optimizer"),
        parameter_device=offload_device(ds_config, "param"),
        reduce_bucket_size=found.reduce_bucket_size,
        overlap_comm=bool(found.overlap_comm),
        multi_rank_bucket_allreduce=found.use_multi_rank_bucket_allreduce,
        persistence_threshold=found.param_persistence_threshold,
        max_live_parameters=found.max_live_parameters,
        max_reuse_distance=found.max_reuse_distance,
        prefetch_bucket_size=found.prefetch_bucket_size,
        sub_group_size=found.sub_group_size,
        optimizer_buffers=buffers.buffer_count if buffers else Zero.optimizer_buffers,
        parameter_buffer_bytes=weight * parameter_buffers.buffer_count * parameter_buffers.buffer_size
        if parameter_buffers
        else weight * 5 * 100_000_000,
    )


def measure(recipe: "Recipe") -> tuple[ModelShape, int, str]:
    """The shape of the recipe's model, built without weights; its parameters before its vocabulary is padded; and its
    model_type.

    The vocabulary is the tokenizer's where its folder is there, else the configuration's own.
    """
    import torch

    from pipeline.model import auto_class, make_model_config, measure_model, read_model_config
    from pipeline.vocabulary import pad_vocabulary

    folder = Path(recipe.data.tokenizer)
    if folder.exists():
        tokenizer = load_tokenizer_info(folder)
    else:
        words = read_model_config(recipe.model.init_from or recipe.model.config).get("vocab_size")
        if words is None:
            raise UserError(
                f"data.tokenizer is {folder}, which is not there, and the model's configuration has no vocab_size;"
                " give either"
            )
        tokenizer = TokenizerInfo(folder, "", words, SpecialTokens(0, None, None, None, None, None))
    config = make_model_config(recipe, tokenizer)
    with torch.device("meta"):
        model = auto_class(recipe.objective, recipe.pack_settings.is_pairs).from_config(config)
    size = measure_model(model, recipe.objective, recipe.data.sequence_length)
    pad_vocabulary(model, recipe.model.pad_vocab_to_multiple_of)
    return costs.shape_of(model, model.config, size.flops_a_token), size.parameters, config.model_type


def batch_of(recipe: "Recipe") -> Batch:
    """What a rank computes at a time, as far as the recipe decides it."""
    rate = recipe.masking.probability
    masked = max(rate.values()) if isinstance(rate, dict) else rate
    share = 1.0 if recipe.objective == "causal" else masked
    return Batch(recipe.data.sequence_length, share, recipe.model.activation_checkpointing)


def way(shape: ModelShape, zero: Zero, batch: Batch, cluster: Cluster, global_batch_size: int, mfu: float) -> Way:
    """The step with the largest micro-batch that fits, at a world size that divides the global batch."""
    share = global_batch_size // cluster.world_size
    budget = costs.usable_memory(cluster.gpu)
    micro = costs.largest_micro_batch(shape, zero, batch, share, cluster.world_size, budget)
    steps = share // max(micro, 1)
    states = costs.state_memory(shape.groups, zero, cluster.world_size, steps)
    least = costs.peak_memory(shape, zero, batch, 1, cluster.world_size, share)
    if not micro:
        return Way(zero, states, least, 0, steps, None, None)
    sent = costs.communication(shape, zero, cluster.world_size, steps)
    time = costs.step_time(
        shape, zero, batch, cluster.gpu, global_batch_size=global_batch_size, micro_batch_size=micro,
        world_size=cluster.world_size, gpus_per_node=cluster.gpus_per_node, mfu=mfu,
    )  # fmt: skip
    return Way(zero, states, least, micro, steps, sent, time)


def ways(
    shape: ModelShape, given: Zero, batch: Batch, cluster: Cluster, global_batch_size: int, mfu: float
) -> list[Way]:
    """Every stage and offload, with the precision and bucket sizes of the ds_config given."""
    found = []
    for stage, optimizer_device, parameter_device in _WAYS:
        zero = replace(
            given,
            stage=stage,
            optimizer_device=optimizer_device,
            parameter_device=parameter_device,
            # DeepSpeed refuses another dtype at stage 0.
            accumulation_bytes=given.accumulation_bytes if stage else given.weight_bytes,
            overlap_comm=given.overlap_comm if stage == given.stage else stage >= 2,
        )
        found.append(way(shape, zero, batch, cluster, global_batch_size, mfu))
    return found


def choose(found: list[Way], given: Mapping[str, Any], optimizer: "OptimizerSection") -> Way | None:
    """The first that fits and is within CLOSE of the fastest; None where nothing fits.

    Stage 0 in 16 bits accumulates gradients in 16 bits and NVMe needs a path: neither is chosen where the optimizer
    leaves another. given: the ds_config. optimizer: the recipe's, which not every stage takes.
    """
    fitting = [entry for entry in found if entry.time is not None and _takes(entry, given, optimizer)]
    usual = [
        entry
        for entry in fitting
        if entry.zero.optimizer_device != "nvme" and (entry.zero.stage > 0 or entry.zero.precision == "fp32")
    ]
    fitting = usual or [entry for entry in fitting if entry.zero.stage == 0]
    best = min((entry.time.total for entry in fitting if entry.time), default=0.0)
    return next((entry for entry in fitting if entry.time and entry.time.total <= CLOSE * best), None)


def _takes(entry: Way, given: Mapping[str, Any], optimizer: "OptimizerSection") -> bool:
    """Whether DeepSpeed carries this optimizer out that way, and the average of the weights can be kept."""
    from pipeline.ds_config import check_average, check_optimizer

    try:
        config = ds_config_of(entry, given)
        check_optimizer(config, optimizer.type)
        check_average(config, optimizer.ema_decay)
    except UserError:
        return False
    return True


def ds_config_of(chosen: Way, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ds_config given with the chosen stage, offload and micro-batch; the other sections stay as they are."""
    zero = chosen.zero
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage:
        section["reduce_bucket_size"] = zero.reduce_bucket_size
    before = given.get("zero_optimization")
    if zero.stage in (1, 2) and isinstance(before, Mapping) and "allgather_bucket_size" in before:
        section["allgather_bucket_size"] = before["allgather_bucket_size"]
    if zero.stage == 2:
        section["overlap_comm"] = zero.overlap_comm
    if zero.optimizer_device != "none":
        section["offload_optimizer"] = {"device": zero.optimizer_device}
    if zero.parameter_device != "none":
        section["offload_param"] = {"device": zero.parameter_device}
    if isinstance(before, Mapping) and before.get("stage", 0) == zero.stage:
        section = {**before, **section}
        for name, device in (("offload_optimizer", zero.optimizer_device), ("offload_param", zero.parameter_device)):
            if device == "none":
                section.pop(name, None)
    config = {**given, "train_micro_batch_size_per_gpu": chosen.micro_batch_size, "zero_optimization": section}
    config.pop("gradient_accumulation_steps", None)
    return config


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """Rows of a table, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 100e9 else f"{size / 1e9:,.0f}"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _days(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f}" if seconds >= 8640 else f"{seconds / 86_400:,.3f}"


def memory_table(found: list[Way]) -> Iterator[str]:
    """GB of a rank by kind, for every stage and offload; backward, step: copies on top (costs.StateMemory)."""
    kinds = ("parameters", "gradients", "master weights", "optimizer states", "buckets")
    names = ("weights", "gradients", "master", "states", "buckets", "backward", "step", "least", "host", "NVMe")
    rows = [["ZeRO", *names, "micro-batch"]]
    for entry in found:
        states = entry.states
        rows.append(
            [
                entry.zero.name,
                *(_gigabytes(states.device.get(kind, 0)) for kind in kinds),
                *(_gigabytes(size) for size in (states.backward, states.step, entry.least)),
                *(_gigabytes(size) if size else "-" for size in (sum(states.host.values()), states.nvme)),
                str(entry.micro_batch_size) if entry.micro_batch_size else "none fits",
            ]
        )
    yield from _columns(rows)


def time_table(found: list[Way], tokens_a_step: int) -> Iterator[str]:
    """Bytes that a rank sends and seconds of a step, for every stage and offload that fits."""
    rows = [["ZeRO", "accumulation", "GB sent", "compute s", "exposed s", "optimizer s", "step s", "tokens/s"]]
    for entry in found:
        if entry.time is not None and entry.communication is not None:
            time = entry.time
            rows.append(
                [
                    entry.zero.name,
                    str(entry.accumulation_steps),
                    _gigabytes(entry.communication.bytes),
                    *map(_seconds, (time.compute, time.exposed_communication, time.optimizer, time.total)),
                    f"{tokens_a_step / time.total:,.0f}",
                ]
            )
    yield from _columns(rows)


def scaling_table(
    best: Callable[[int, int], Way | None], shape: ModelShape, cluster: Cluster, recipe: "Recipe", precision: str
) -> Iterator[str]:
    """The chosen way at each of SCALES for the recipe's tokens. best: of a number of ranks and a global batch.

    Where the recipe's global batch does not divide, the next one that does is taken, in fewer steps.
    """
    rows = [["GPUs", "global batch", "ZeRO", "micro-batch", "step s", "tokens/s", "MFU", "days", "GPU-hours"]]
    stated = max(recipe.training.batch_sizes.stages.values())
    tokens = recipe.training.batch_sizes.trained(recipe.max_steps) * recipe.data.sequence_length
    for world_size in SCALES:
        global_batch_size = -(-stated // world_size) * world_size
        size = f"{global_batch_size:,}{'' if global_batch_size == stated else '*'}"
        chosen = best(world_size, global_batch_size)
        if chosen is None or chosen.time is None:
            rows.append([f"{world_size:,}", size, "none fits", *["-"] * 6])
            continue
        rate = global_batch_size * recipe.data.sequence_length / chosen.time.total
        seconds = tokens / rate
        rows.append(
            [
                f"{world_size:,}",
                size,
                chosen.zero.name,
                f"{chosen.micro_batch_size} x {chosen.accumulation_steps}",
                _seconds(chosen.time.total),
                f"{rate:,.0f}",
                f"{shape.flops_a_token * rate / (world_size * cluster.gpu.flops(precision)):.1%}",
                _days(seconds),
                f"{seconds * world_size / 3600:,.0f}",
            ]
        )
    yield from _columns(rows)


def plan(
    recipe: "Recipe", ds_config: dict[str, Any], gpu_name: str, nodes: int, gpus_per_node: int, mfu: float
) -> tuple[Iterator[str], dict[str, Any] | None]:
    """The lines of a plan, and the ds_config that it chooses: None where nothing fits.

    ds_config: as pipeline.configuration.resolve returns it. Raises UserError when the global batch is not a multiple of
    the GPUs, or the precision is not the card's.
    """
    name, gpu = card(gpu_name)
    cluster = Cluster(gpu, gpus_per_node, nodes * gpus_per_node)
    sizes = recipe.training.batch_sizes
    global_batch_size = max(sizes.stages.values())
    if global_batch_size % cluster.world_size:
        fitting = -(-global_batch_size // cluster.world_size) * cluster.world_size
        raise UserError(
            f"training.global_batch_size is {global_batch_size}, not a multiple of the {cluster.world_size} GPUs"
            f" ({nodes} nodes x {gpus_per_node}); take {fitting} samples or another number of GPUs"
        )
    shape, parameters, model_type = measure(recipe)
    batch = batch_of(recipe)
    given = zero_of(ds_config, recipe.optimizer)
    optimizer = recipe.optimizer

    def best(world_size: int, samples: int) -> Way | None:
        scaled = replace(cluster, world_size=world_size)
        return choose(ways(shape, given, batch, scaled, samples, mfu), ds_config, optimizer)

    found = ways(shape, given, batch, cluster, global_batch_size, mfu)
    chosen = choose(found, ds_config, optimizer)

    def lines() -> Iterator[str]:
        sequence, steps = batch.sequence_length, recipe.max_steps
        tokens = sizes.trained(steps) * sequence
        tokens_a_step = global_batch_size * sequence
        optimal = costs.TOKENS_A_PARAMETER * parameters
        yield (
            f"model     {model_type}, {parameters / 1e6:,.1f} M parameters, {shape.flops_a_token / 1e9:,.3f} GFLOPs a"
            " token (forward and backward)"
        )
        yield (
            f"tokens    {_short(tokens)} in {steps:,} steps of {_short(tokens_a_step)}, {tokens / parameters:,.1f} a"
            f" parameter; compute-optimal: {_short(optimal)}, {costs.TOKENS_A_PARAMETER} a parameter (Hoffmann 2022)"
        )
        yield (
            f"hardware  {nodes} x {gpus_per_node} {name}: {gpu.memory / 1e9:.0f} GB,"
            f" {gpu.flops(given.precision) / 1e12:,.0f} TFLOP/s in {given.precision},"
            f" {gpu.intra_node_bandwidth / 1e9:.0f} GB/s in a node, {gpu.inter_node_bandwidth / 1e9:.0f} a GPU between"
        )
        yield f"source    {gpu.source}"
        yield (
            f"assumed   MFU {mfu:.0%} of forward and backward; links at {costs.COLLECTIVE_EFFICIENCY:.0%}, hops of"
            f" {costs.HOP_SECONDS * 1e6:.0f} us, HBM at {costs.MEMORY_EFFICIENCY:.0%}; host link"
            f" {costs.HOST_LINK / 1e9:.0f}, host memory {costs.HOST_MEMORY / 1e9:.0f}, NVMe {costs.NVME / 1e9:.0f}"
            f" GB/s; usable {_gigabytes(costs.usable_memory(gpu))} GB"
        )
        layer = costs.layer_activations(shape, given.weight_bytes) * sequence * shape.layers
        checkpointed = costs.activation_memory(shape, sequence, given.weight_bytes, "full")
        targets = math.ceil(sequence * batch.target_share)
        yield (
            f"a sample  {_gigabytes(layer)} GB of activations, {_gigabytes(checkpointed)} with full activation"
            f" checkpointing; loss {_gigabytes(costs.loss_memory(shape, targets, given.weight_bytes))} GB;"
            f" this recipe: checkpointing {batch.checkpointing}"
        )
        yield (
            f"\nGB a rank at {cluster.world_size} GPUs (backward, step: copies on top at that time; least: the peak at"
            " a micro-batch of one sample)"
        )
        yield from memory_table(found)
        yield "\nA step with the largest micro-batch that fits"
        yield from time_table(found, tokens_a_step)
        yield f"\nThe recipe's tokens at other sizes, {gpus_per_node} GPUs a node (*: not the recipe's batch)"
        yield from scaling_table(best, shape, cluster, recipe, given.precision)
        if chosen is None or chosen.time is None:
            full = ways(shape, given, replace(batch, checkpointing="full"), cluster, global_batch_size, mfu)
            mended = batch.checkpointing != "full" and choose(full, ds_config, optimizer) is not None
            yield (
                "\nchosen    nothing fits: "
                + (
                    "take full activation checkpointing"
                    if mended
                    else "take more GPUs, larger ones, or shorter samples"
                )
            )
            return
        seconds = chosen.time.total * steps
        yield (
            f"\nchosen    ZeRO {chosen.zero.name}, micro-batch {chosen.micro_batch_size} x accumulation"
            f" {chosen.accumulation_steps} x {cluster.world_size} GPUs: {_seconds(chosen.time.total)} s a step,"
            f" {_days(seconds)} days, {seconds * cluster.world_size / 3600:,.0f} GPU-hours"
        )

    return lines(), None if chosen is None else ds_config_of(chosen, ds_config)


def expectations(
    shape: ModelShape,
    recipe: "Recipe",
    ds_config: Mapping[str, Any],
    batches: "BatchPlan",
    *,
    device_name: str,
    gpus_per_node: int,
) -> Iterator[str]:
    """What a run that is about to start will hold and take, in lines; time only where the card is known.

    gpus_per_node: ranks of this host.
    """
    zero = zero_of(ds_config, recipe.optimizer)
    batch, world_size = batch_of(recipe), batches.world_size
    micro, accumulation = batches.micro_batch_size, batches.gradient_accumulation_steps
    states = costs.state_memory(shape.groups, zero, world_size, accumulation)
    peak = costs.peak_memory(shape, zero, batch, micro, world_size, accumulation)
    host = sum(states.host.values())
    outside = f" (and {_gigabytes(host)} GB of the host's)" if host else ""
    yield (
        f"memory    {_gigabytes(states.held)} GB of weights, gradients and states a rank{outside},"
        f" {_gigabytes(peak)} GB at the peak of a step, as predicted"
    )
    gpu = find_gpu(device_name)
    if gpu is None:
        yield f"time      said after the first steps: no peak is known for {device_name}"
        return
    time = costs.step_time(
        shape, zero, batch, gpu, global_batch_size=batches.global_batch_size, micro_batch_size=micro,
        world_size=world_size, gpus_per_node=gpus_per_node, mfu=DEFAULT_MFU,
    )  # fmt: skip
    yield (
        f"time      {_seconds(time.total)} s a step, {_days(time.total * recipe.max_steps)} days, as predicted at"
        f" {DEFAULT_MFU:.0%} of the card's peak"
    )


def main(argv: list[str]) -> int:
    parsed, others = _parser().parse_known_args(argv)
    return exit_status(lambda: _show(parsed, others))


def _show(parsed: argparse.Namespace, others: list[str]) -> int:
    """Prints the plan; 1 where nothing fits. others: pretrain.py's command line, the fields of the recipe."""
    card(parsed.gpu)
    command = parse_arguments(
        ["--deepspeed_config", str(parsed.deepspeed_config), "--recipe", str(parsed.recipe), *others]
    )
    from pipeline.configuration import resolve

    recipe, ds_config = resolve(command.recipe, command.overrides, command.deepspeed_config)
    lines, chosen = plan(recipe, ds_config, parsed.gpu, parsed.nodes, parsed.gpus_per_node, parsed.mfu)
    for line in lines:
        print(line)
    if chosen is None:
        return 1
    if parsed.write is None:
        print(json.dumps(chosen, indent=2))
        return 0
    try:
        durable.write_json(parsed.write, chosen)
    except OSError as error:
        raise UserError(f"--write {parsed.write}: {error.strerror}; give another path") from None
    print(f"written   {parsed.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
