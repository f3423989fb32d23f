"""The DeepSpeed engine of a run: optimizer, precision, and steps whose gradients are the global batch's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.randomness import seed_of
from pipeline.ds_config import offload_device, precision, zero_stage
from pipeline.objective import loss_sum
from pipeline.recipe import OptimizerSection
from pipeline.samples import Batch
from pipeline.startup import World

if TYPE_CHECKING:
    import torch

_DROPOUT = 5  # first coordinate of the dropout seeds; see pipeline.samples for the others


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norms (one dimension) do not, as GPT-2's and BERT's trainings do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: "torch.nn.Module", recipe: OptimizerSection, ds_config: dict[str, Any]
) -> "torch.optim.Optimizer":
    """AdamW: torch's fused kernel, which needs no C++ op to be built, or DeepSpeed's where the states are offloaded.

    Its learning rate is 0 until a step sets one: DeepSpeed takes a step with zero gradients in its initialisation.
    """
    import torch

    groups = parameter_groups(model, recipe.weight_decay)
    common: dict[str, Any] = {"lr": 0.0, "betas": recipe.betas, "eps": recipe.eps}
    if offload_device(ds_config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


@dataclass(frozen=True)
class StepResult:
    """loss: nats a target token of the global batch, before the update. grad_norm: before clipping; None where the
    ds_config turns it off, or where it overflowed and fp16 skips the step. tokens: targets of the global batch."""

    loss: float
    grad_norm: float | None
    tokens: int


class Engine:
    """A DeepSpeed engine that takes whole optimizer steps.

    ds_config: complete (pipeline.ds_config.complete_ds_config). seed: of dropout, which is a pure function of (seed,
    step, micro-batch, rank).
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        recipe: OptimizerSection,
        ds_config: dict[str, Any],
        world: World,
        seed: int,
    ) -> None:
        import deepspeed

        self.world = world
        self._seed = seed
        optimizer = make_optimizer(model, recipe, ds_config)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        unsharded, in_fp32 = zero_stage(ds_config) == 0, precision(ds_config) == "fp32"
        if unsharded and not in_fp32:
            # The step of its initialisation (FP16_UnfusedOptimizer) would count as Adam's first.
            optimizer.state.clear()
        # In plain data parallelism in fp32 DeepSpeed clips without keeping the norm.
        self._measures_norm = unsharded and in_fp32

    def _loss_sum(self, batch: Batch) -> "torch.Tensor":
        import torch

        arrays = [batch.input_ids, batch.labels]
        if len(batch.targets) < batch.labels.size:
            arrays.append(batch.targets)
        tensors = (torch.from_numpy(array).to(self.world.device, non_blocking=True) for array in arrays)
        return loss_sum(self.deepspeed, *tensors)

    def train_step(self, step: int, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of step `step`.

        The loss is the sum over the target tokens of all ranks and micro-batches divided by their number, and the
        gradients are those of that loss: each micro-batch's sum is divided by the global count, and what DeepSpeed
        divides by once more when it averages over ranks is multiplied back.
        """
        import torch
        from torch import distributed

        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        targets = torch.tensor(sum(len(batch.targets) for batch in batches), device=self.world.device)
        distributed.all_reduce(targets)
        tokens = int(targets.item())
        scale = self.world.size / max(tokens, 1)
        total = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(seed_of(_DROPOUT, self._seed, step, index, self.world.rank))
            loss = self._loss_sum(batch)
            total += loss.detach()
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            if index < len(batches) - 1:
                self.deepspeed.step()
        norm = self._norm_of_gradients() if self._measures_norm else None
        self.deepspeed.step()
        distributed.all_reduce(total)
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        finite = norm is not None and math.isfinite(norm)
        return StepResult(float(total) / max(tokens, 1), float(norm) if finite else None, tokens)

    def _norm_of_gradients(self) -> "torch.Tensor":
        from torch.nn.utils import get_total_norm

        return get_total_norm([p.grad for p in self.deepspeed.module.parameters() if p.grad is not None])

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Loss in nats a target token over the batches of all ranks (each rank gives equally many)."""
        import torch
        from torch import distributed

        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.deepspeed.eval()
        with torch.no_grad():
            for batch in batches:
                sums[0] += self._loss_sum(batch).double()
                sums[1] += len(batch.targets)
        self.deepspeed.train()
        distributed.all_reduce(sums)
        return float(sums[0] / sums[1])
