"""What a run costs before it is started: memory of a rank, bytes on the wire, time of a step. Pure functions.

P is the number of trained parameters, W the number of data-parallel ranks. What DeepSpeed holds was read in its source
(0.19.8; the file stands at each rule) and is compared with real ranks in tests/distributed/test_plan_memory.py.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.hardware import Gpu
from pipeline.heads import ROWS_OF_GPUS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

FP32 = 4
WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Moments a parameter, in float32. Muon's matrices have one, what it leaves to AdamW two: counted as two.
MOMENTS = {"AdamW": 2, "Lamb": 2, "Lion": 1, "Muon": 2}
# Elements that the engine reduces at a time outside ZeRO 2 and 3 (runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
ENGINE_BUCKET = 500_000_000
# Norms are taken in float64 (runtime/utils.py, get_norm_dtype), one tensor at a time.
_NORM_BYTES = 8

TOKENS_A_PARAMETER = 20
"""Compute-optimal training (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", table 3)."""

# What the estimates of time assume; each is printed with them.
COLLECTIVE_EFFICIENCY = 0.8
"""Share of a link's rate that collectives of large messages reach."""
HOP_SECONDS = 15e-6
"""Of one message of a collective; it takes log2(W) of them each way."""
MEMORY_EFFICIENCY = 0.8
"""Share of the memory's rate that the optimizer's step reaches."""
HOST_LINK = 25e9
"""Bytes/s between a GPU and the host's memory: PCIe 4.0 x16 as reached."""
HOST_MEMORY = 200e9
"""Bytes/s of a node's memory, shared by the ranks whose states are offloaded."""
NVME = 6e9
"""Bytes/s of a node's NVMe drives, shared likewise."""
RESERVED = 2e9
"""Bytes of a GPU that CUDA's context and NCCL take."""
FRAGMENTATION = 0.05
"""Share of the rest that torch's allocator cannot use."""


@dataclass(frozen=True)
class ModelShape:
    """groups: elements of each trained parameter, by the optimizer's groups (matrices, vectors), in the model's order.

    flops_a_token: of forward and backward (pipeline.model.ModelSize). heads, head_size, key_value_heads: of attention.
    intermediate: width of the feed-forward block. feed_forward_inputs: matrices into it, 2 where it is gated.
    activation_tensors: of that width that the activation function keeps besides its input and output. rms_norm: whether
    norms are transformers' RMSNorm, computed in float32 by single operations. dropouts: of residuals in a layer.
    """

    groups: tuple[tuple[int, ...], ...]
    flops_a_token: float
    layers: int
    hidden: int
    heads: int
    head_size: int
    key_value_heads: int
    intermediate: int
    feed_forward_inputs: int
    activation_tensors: int
    rms_norm: bool
    dropouts: int
    vocabulary: int

    @property
    def tensors(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(self.groups))

    @property
    def parameters(self) -> int:
        return sum(self.tensors)


# Activations that transformers computes by single operations, with the tensors that these keep beyond a fused one's.
# NewGELU: x^3, tanh and both factors of the product are kept where the fused function keeps x alone.
_UNFUSED_ACTIVATIONS = {"gelu_new": 3}
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation")
_DROPOUTS = ("resid_pdrop", "hidden_dropout_prob", "hidden_dropout", "dropout", "mlp_dropout")


def shape_of(model: "torch.nn.Module", config: "PretrainedConfig", flops_a_token: float) -> ModelShape:
    """The shape of a transformers model, whose weights may be on the meta device."""
    text = config.get_text_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        tuple(parameter.numel() for parameter in trained if parameter.ndim >= 2),
        tuple(parameter.numel() for parameter in trained if parameter.ndim < 2),
    )
    hidden, heads, layers = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    head_size = getattr(text, "head_dim", None) or hidden // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    intermediate = next((width for name in _WIDTHS if (width := getattr(text, name, None))), 4 * hidden)
    attention = 2 * hidden * head_size * (heads + key_value_heads)
    matrices = _matrices_of_a_layer(model, layers)
    return ModelShape(
        groups=tuple(group for group in groups if group),
        flops_a_token=flops_a_token,
        layers=layers,
        hidden=hidden,
        heads=heads,
        head_size=head_size,
        key_value_heads=key_value_heads,
        intermediate=intermediate,
        feed_forward_inputs=max(1, round((matrices - attention) / (hidden * intermediate)) - 1),
        activation_tensors=max(_UNFUSED_ACTIVATIONS.get(getattr(text, name, ""), 0) for name in _ACTIVATIONS),
        rms_norm=hasattr(text, "rms_norm_eps"),
        dropouts=2 if any(getattr(text, name, 0) for name in _DROPOUTS) else 0,
        vocabulary=text.vocab_size,
    )


def _matrices_of_a_layer(model: "torch.nn.Module", layers: int) -> int:
    """Elements of the matrices of one layer: the first list of modules that is as long as the model is deep."""
    from torch import nn

    stack = next(
        (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers), ()
    )
    return sum(
        parameter.numel() for block in list(stack)[-1:] for parameter in block.parameters() if parameter.ndim == 2
    )


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed carries a run out, as far as memory and messages follow from it; sizes in elements.

    precision: of the weights, "bf16", "fp16" or "fp32". accumulation_bytes, communication_bytes: of an element of a
    gradient as it is accumulated and sent. moment_bytes: of the optimizer's states, a parameter. optimizer_device,
    parameter_device: "none" (the GPU), "cpu" or "nvme". multi_rank_bucket_allreduce: whether stage 2 sums a bucket for
    all ranks, where otherwise each part goes to its owner alone. The others: DeepSpeed's keys.
    """

    stage: int
    precision: str = "bf16"
    accumulation_bytes: int = FP32
    communication_bytes: int = 2
    moment_bytes: int = 2 * FP32
    optimizer_device: str = "none"
    parameter_device: str = "none"
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    multi_rank_bucket_allreduce: bool = True
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 1_000_000_000
    optimizer_buffers: int = 4
    parameter_buffer_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return WEIGHT_BYTES[self.precision]

    @property
    def name(self) -> str:
        """As "3, states cpu, weights nvme"."""
        outside = {"states": self.optimizer_device, "weights": self.parameter_device}
        return ", ".join([str(self.stage), *(f"{what} {where}" for what, where in outside.items() if where != "none")])


@dataclass(frozen=True)
class StateMemory:
    """Bytes of a rank.

    device: held from the end of a backward pass to the step, by kind. backward: on top while gradients are made and
    reduced, beside the activations. step: on top while gradients are reduced after the backward pass and the optimizer
    steps, when activations are gone. host, nvme: the same for offloaded states.
    """

    device: Mapping[str, int]
    backward: int
    step: int
    host: Mapping[str, int] = field(default_factory=dict)
    nvme: int = 0

    @property
    def held(self) -> int:
        return sum(self.device.values())

    def peak(self, activations: int = 0) -> int:
        """Bytes of the device at the worst moment of a step."""
        return self.held + max(self.backward + activations, self.step)


def _partition(group: Sequence[int], world_size: int) -> int:
    """Elements of a rank's share of a flat group, padded to 2 x W (stage_1_and_2.py, nccl_start_alignment_factor)."""
    return 2 * -(-sum(group) // (2 * world_size))


def _touched_by_a_partition(group: Sequence[int], world_size: int) -> int:
    """Elements of the parameters that lie wholly or partly in a rank's share: the most that a rank has."""
    ends = list(itertools.accumulate(group))
    size = _partition(group, world_size)
    most = 0
    for start in range(0, ends[-1], size):
        first = bisect.bisect_right(ends, start)
        last = min(bisect.bisect_left(ends, start + size), len(ends) - 1)
        most = max(most, ends[last] - (ends[first - 1] if first else 0))
    return most


def state_memory(
    groups: Sequence[Sequence[int]], zero: Zero, world_size: int, accumulation_steps: int = 1
) -> StateMemory:
    """Parameters, gradients, states, buckets and temporary copies that DeepSpeed holds on a rank, without activations.

    groups: elements of each parameter by the optimizer's groups (ModelShape.groups).
    """
    rules = {0: _stage_0, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}
    bf16_optimizer = zero.stage == 1 and zero.precision == "bf16" and zero.accumulation_bytes == FP32
    if bf16_optimizer and zero.optimizer_device == "none":
        return _stage_1_bf16(groups, zero, world_size)
    return rules[zero.stage](groups, zero, world_size, accumulation_steps)


def _stage_0(groups: Sequence[Sequence[int]], zero: Zero, world_size: int, accumulation_steps: int) -> StateMemory:
    """engine.py, allreduce_bucket: gradients are copied into a flat bucket. fp16/unfused_optimizer.py, step: and into
    float32."""
    tensors = list(itertools.chain.from_iterable(groups))
    numel, weight = sum(tensors), zero.weight_bytes
    mixed = zero.precision != "fp32"
    device = {
        "parameters": weight * numel,
        "gradients": weight * numel,
        "master weights": FP32 * numel if mixed else 0,
        "optimizer states": zero.moment_bytes * numel,
    }
    bucket = weight * min(numel, ENGINE_BUCKET + max(tensors))
    return StateMemory(device, backward=0, step=max(bucket, FP32 * numel if mixed else 0))


def _stage_1_bf16(groups: Sequence[Sequence[int]], zero: Zero, world_size: int) -> StateMemory:
    """bf16_optimizer.py: whole gradients in bf16 and in float32. engine.py, allreduce_no_retain: reduced by groups."""
    sizes = [sum(group) for group in groups]
    padded = [world_size * _partition(group, world_size) for group in groups]
    partition = sum(padded) // world_size
    device = {
        "parameters": zero.weight_bytes * sum(padded),
        "gradients": zero.weight_bytes * sum(sizes) + FP32 * sum(padded),
        "master weights": FP32 * partition,
        "optimizer states": zero.moment_bytes * partition,
    }
    alone = padded[0] > ENGINE_BUCKET or len(padded) == 1  # then it is reduced where it is
    sent = max(padded) if alone else sum(padded)
    converted = zero.communication_bytes * sent if zero.communication_bytes != FP32 else 0
    return StateMemory(device, backward=0, step=converted + (0 if alone else FP32 * sent))


def _stage_1_and_2(
    groups: Sequence[Sequence[int]], zero: Zero, world_size: int, accumulation_steps: int
) -> StateMemory:
    """zero/stage_1_and_2.py: setup_buckets, average_tensor, copy_grads_in_partition, step."""
    tensors = list(itertools.chain.from_iterable(groups))
    numel, largest, weight = sum(tensors), max(tensors), zero.weight_bytes
    accumulation = zero.accumulation_bytes
    partitions = [_partition(group, world_size) for group in groups]
    partition = sum(partitions)
    offloaded = zero.optimizer_device != "none"
    converts = accumulation != weight
    touched = sum(_touched_by_a_partition(group, world_size) for group in groups)

    device = {"parameters": weight * partition * world_size}
    if zero.stage == 1:
        device["gradients"] = accumulation * numel
    elif converts:  # on the device where states are offloaded as well
        device["gradients"] = accumulation * partition
    elif not offloaded:
        device["gradients"] = weight * touched
    host = {}
    if offloaded:
        device["buckets"] = weight * largest
        host = {
            "gradients": FP32 * partition + (weight * touched if accumulation_steps > 1 and not converts else 0),
            "master weights": FP32 * partition,
            "optimizer states": zero.moment_bytes * partition,
            "buckets": weight * (partition + largest),
        }
    else:
        device["master weights"] = FP32 * partition
        device["optimizer states"] = zero.moment_bytes * partition

    bucket_bytes = accumulation if zero.stage == 1 else weight
    buckets = bucket_bytes * zero.reduce_bucket_size * (2 if zero.overlap_comm else 1)
    reduced = min(zero.reduce_bucket_size, numel)
    copies = bucket_bytes * reduced + (accumulation * largest if converts and zero.stage == 2 else 0)
    if zero.stage == 2 and not converts and not offloaded and accumulation_steps > 1:
        again = weight * touched  # the micro-batch's own, to be added to those before
        copies = max(copies, again) if numel <= zero.reduce_bucket_size else copies + again + weight * largest
    step = _NORM_BYTES * largest
    if not offloaded and not (converts and zero.stage == 2):  # gradients are flattened group by group
        flat = accumulation + (FP32 if accumulation != FP32 else 0)
        step = max(step, flat * max(partitions))
    return StateMemory(device, backward=buckets + copies, step=0 if offloaded else step, host=host)


def gathered_parameters(tensors: Sequence[int], zero: Zero) -> int:
    """Elements of whole parameters that stage 3 holds at a time, at most.

    Every module fetches ahead of itself, so all of the model is there unless max_live_parameters is less (zero/
    partitioned_param_coordinator.py, fetch_sub_module).
    """
    return min(sum(tensors), zero.max_live_parameters + max(tensors))


def _kept_parameters(numel: int, zero: Zero) -> int:
    """Elements that stage 3 keeps from the forward to the backward pass: those used again within max_reuse_distance,
    in which forward and backward count (partitioned_param_coordinator.py, __params_to_release)."""
    return min(numel, zero.max_reuse_distance // 2, zero.max_live_parameters)


def _stage_3(groups: Sequence[Sequence[int]], zero: Zero, world_size: int, accumulation_steps: int) -> StateMemory:
    """zero/stage3.py: _setup_for_real_optimizer, __avg_scatter_grads with comm/coalesced_collectives.py, step."""
    tensors = list(itertools.chain.from_iterable(groups))
    weight, accumulation = zero.weight_bytes, zero.accumulation_bytes
    partitions = [sum(-(-numel // world_size) for numel in group) for group in groups]
    partition = sum(partitions)
    sub_group = min(max(partitions), zero.sub_group_size)
    persistent = sum(numel for numel in tensors if numel < zero.persistence_threshold)

    device = {"parameters": weight * persistent, "buckets": zero.communication_bytes * zero.reduce_bucket_size}
    host: dict[str, int] = {}
    nvme = 0
    if zero.parameter_device == "none":
        device["parameters"] += weight * partition
    elif zero.parameter_device == "cpu":
        host["parameters"] = weight * partition
    else:
        host["parameters"] = zero.parameter_buffer_bytes
        nvme += weight * partition
    if zero.optimizer_device == "none":
        device["gradients"] = accumulation * partition
        device["master weights"] = FP32 * partition
        device["optimizer states"] = zero.moment_bytes * partition
    elif zero.optimizer_device == "cpu":
        host["gradients"] = (accumulation + FP32) * partition
        host["master weights"] = FP32 * partition
        host["optimizer states"] = zero.moment_bytes * partition
    else:
        host["gradients"] = accumulation * partition + FP32 * sub_group
        host["buckets"] = zero.optimizer_buffers * FP32 * sub_group
        nvme += (2 * FP32 + zero.moment_bytes) * partition

    gathered = gathered_parameters(tensors, zero)
    reduced = min(zero.reduce_bucket_size, sum(tensors))
    shards = accumulation * -(-reduced // world_size) if accumulation != zero.communication_bytes else 0
    # The first bucket is full when as many parameters have been through their backward pass, and are released.
    left = max(gathered - reduced, 0) + max(tensors)
    # What is fetched ahead arrives in one buffer and is copied out of it.
    fetched = gathered + min(zero.prefetch_bucket_size, gathered)
    backward = max(weight * fetched, weight * left + zero.communication_bytes * reduced + shards)
    step = (accumulation + (FP32 if accumulation != FP32 else 0)) * sub_group
    return StateMemory(device, backward, step if zero.optimizer_device == "none" else 0, host, nvme)


def layer_activations(shape: ModelShape, element_bytes: int) -> int:
    """Bytes that one layer keeps of a token for its backward pass.

    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), equation 2, without the
    term of the attention scores, which SDPA's and FlashAttention's kernels do not keep: 34 hidden bytes a token in 16
    bits. In elements: attention's input, queries, keys, values and result, the inputs of both norms, the feed-forward
    block's input, what goes into its activation and comes out; dropout masks are a byte. Gated blocks keep both factors
    and their product, RMSNorm its float32 copy and its normalised input, unfused activations each operation's operands.
    """
    kept = 2 * shape.hidden  # the inputs of attention and of the feed-forward block
    kept += shape.head_size * (2 * shape.heads + 2 * shape.key_value_heads)
    # One matrix in: its result and the activation's; two: both results, the activation's and the product.
    kept += shape.intermediate * (2 * shape.feed_forward_inputs + shape.activation_tensors)
    norms = 2 * shape.hidden * element_bytes  # their inputs
    if shape.rms_norm:
        norms = 2 * shape.hidden * (FP32 + element_bytes)
    # The log-sum-exp of attention, and dropout's masks.
    return element_bytes * kept + norms + FP32 * shape.heads + shape.dropouts * shape.hidden


def activation_memory(shape: ModelShape, tokens: int, element_bytes: int, checkpointing: str) -> int:
    """Bytes that the model keeps of a micro-batch at the start of the backward pass; its ends count as 4 hidden.

    checkpointing "full" keeps each layer's input alone and makes one layer's activations again (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost", with a segment a layer). Anything else counts as none.
    """
    layer = layer_activations(shape, element_bytes)
    ends = 4 * shape.hidden * element_bytes  # embeddings with their norm, the last norm, the head's transform
    if checkpointing == "full":
        return tokens * (shape.layers * shape.hidden * element_bytes + layer + ends)
    return tokens * (shape.layers * layer + ends)


def working_memory(shape: ModelShape, tokens: int, element_bytes: int) -> int:
    """Bytes of the gradients that a layer's backward pass has at a time: of the block's width and of the residual."""
    return tokens * element_bytes * (2 * shape.intermediate + 2 * shape.hidden)


def loss_memory(shape: ModelShape, targets: int, element_bytes: int) -> int:
    """Bytes of a micro-batch's loss at the worst moment (pipeline.heads): ROWS_OF_GPUS rows of logits and softmax,
    hidden states and gradients of the targets, and the output matrix's gradient in float32.

    targets: positions of the micro-batch that have a loss.
    """
    chunk = min(ROWS_OF_GPUS, targets) * shape.vocabulary
    matrix = FP32 * shape.vocabulary * shape.hidden
    return 2 * element_bytes * targets * shape.hidden + matrix + (element_bytes + 2 * FP32) * chunk


@dataclass(frozen=True)
class Batch:
    """What a rank computes at a time. tokens: of a sample. target_share: of the positions that have a loss.
    checkpointing: of activations, see activation_memory."""

    sequence_length: int
    target_share: float = 1.0
    checkpointing: str = "none"


def micro_batch_memory(shape: ModelShape, batch: Batch, samples: int, element_bytes: int) -> int:
    """Bytes of activations, the work on them, and the loss, for a micro-batch of so many samples."""
    tokens = samples * batch.sequence_length
    loss = loss_memory(shape, math.ceil(tokens * batch.target_share), element_bytes)
    layers = activation_memory(shape, tokens, element_bytes, batch.checkpointing)
    # The loss is over when the first layer's backward pass begins.
    return layers + max(loss, working_memory(shape, tokens, element_bytes))


def peak_memory(
    shape: ModelShape, zero: Zero, batch: Batch, samples: int, world_size: int, accumulation_steps: int
) -> int:
    """Bytes of the device at the worst moment of a step, without what CUDA takes for itself."""
    states = state_memory(shape.groups, zero, world_size, accumulation_steps)
    return states.peak(micro_batch_memory(shape, batch, samples, zero.weight_bytes))


def usable_memory(gpu: Gpu) -> float:
    """Bytes that tensors can take of a card (RESERVED, FRAGMENTATION)."""
    return (gpu.memory - RESERVED) * (1 - FRAGMENTATION)


def largest_micro_batch(shape: ModelShape, zero: Zero, batch: Batch, share: int, world_size: int, budget: float) -> int:
    """The largest divisor of a rank's share of the global batch that fits in `budget` bytes; 0 where none does."""
    for samples in range(share, 0, -1):
        if share % samples == 0 and peak_memory(shape, zero, batch, samples, world_size, share // samples) <= budget:
            return samples
    return 0


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends (and receives) in a step. overlapped: beside the computation; exposed: after it.
    messages: collectives."""

    overlapped: float
    exposed: float
    messages: int

    @property
    def bytes(self) -> float:
        return self.overlapped + self.exposed


def communication(shape: ModelShape, zero: Zero, world_size: int, accumulation_steps: int) -> Communication:
    """Bytes on the wire with ring algorithms: (W - 1)/W of a tensor for a gather or a reduce-scatter, twice that for an
    all-reduce (Rajbhandari et al. 2020, "ZeRO", section 7).

    Stages 0 and 1 reduce once a step, after the last backward pass; 2 and 3 in every micro-batch, so accumulation costs
    them messages. Stage 2 sums whole buckets for all ranks unless use_multi_rank_bucket_allreduce is false. Stage 3
    gathers weights for the forward pass, and for the backward pass those that it did not keep (_kept_parameters).
    """
    numel = shape.parameters
    ring = (world_size - 1) / world_size
    weights = ring * zero.weight_bytes * numel
    gradients = ring * zero.communication_bytes * numel
    buckets = max(1, math.ceil(numel / zero.reduce_bucket_size))
    if zero.stage == 0:
        return Communication(0.0, 2 * gradients, max(1, math.ceil(numel / ENGINE_BUCKET)))
    if zero.stage == 1:
        return Communication(0.0, 2 * gradients + weights, 2 * max(1, math.ceil(numel / ENGINE_BUCKET)))
    if zero.stage == 2:
        reduced = accumulation_steps * gradients * (2 if zero.multi_rank_bucket_allreduce else 1)
        beside = reduced if zero.overlap_comm else 0.0
        return Communication(beside, reduced - beside + weights, accumulation_steps * buckets + 1)
    again = numel - _kept_parameters(numel, zero)
    fetches = max(1, math.ceil(numel / max(zero.prefetch_bucket_size, numel // (2 * shape.layers) + 1)))
    sent = accumulation_steps * (weights * (1 + again / numel) + gradients)
    messages = accumulation_steps * (buckets + fetches * (2 if again else 1))
    return Communication(sent, 0.0, messages) if zero.overlap_comm else Communication(0.0, sent, messages)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step. compute: forward and backward. exposed_communication: what the computation does not
    hide. optimizer: the update, with the way of offloaded states."""

    compute: float
    exposed_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed_communication + self.optimizer


def step_time(
    shape: ModelShape,
    zero: Zero,
    batch: Batch,
    gpu: Gpu,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    gpus_per_node: int,
    mfu: float,
) -> StepTime:
    """mfu: model FLOPs utilisation of the computation alone (Chowdhery et al. 2022, appendix B)."""
    accumulation_steps = global_batch_size // (micro_batch_size * world_size)
    flops = shape.flops_a_token * batch.sequence_length * global_batch_size / world_size
    # The forward pass, a third of the model's FLOPs, is computed again.
    recomputed = 4 / 3 if batch.checkpointing == "full" else 1.0
    compute = recomputed * flops / (gpu.flops(zero.precision) * mfu)
    sent = communication(shape, zero, world_size, accumulation_steps)
    bandwidth = gpu.intra_node_bandwidth
    if world_size > gpus_per_node:
        # A ring enters and leaves a node once; NCCL lays one through each network card.
        bandwidth = min(bandwidth, gpus_per_node * gpu.inter_node_bandwidth)
    bandwidth *= COLLECTIVE_EFFICIENCY
    latency = sent.messages * 2 * math.log2(max(world_size, 1)) * HOP_SECONDS
    # Stage 2 sends gradients in the backward pass alone, stage 3 weights and gradients in both.
    hiding = compute if zero.stage == 3 else compute * (1 - 1 / (3 * recomputed))
    late = sent.exposed / bandwidth
    if sent.overlapped:
        late += max(0.0, sent.overlapped / bandwidth + latency - hiding)
    else:
        late += latency
    return StepTime(compute, late, _optimizer_time(shape, zero, gpu, world_size, gpus_per_node))


def _optimizer_time(shape: ModelShape, zero: Zero, gpu: Gpu, world_size: int, gpus_per_node: int) -> float:
    """Gradient, master weight and both moments are read, the last three and the weight written: bound by memory."""
    partition = shape.parameters / (1 if zero.stage == 0 else world_size)
    moved = partition * (7 * FP32 + zero.weight_bytes)
    if zero.optimizer_device == "none":
        return moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    ranks = min(world_size, gpus_per_node)
    seconds = moved * ranks / HOST_MEMORY + 2 * zero.weight_bytes * partition / HOST_LINK
    if zero.optimizer_device == "nvme":
        seconds += partition * 2 * (FP32 + zero.moment_bytes) * ranks / NVME
    return seconds
