"""Fine-tuning on the DeepSpeed engine: whole optimizer steps, over samples whose order follows from seed and epoch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.randomness import permute, seed_of
from pipeline import dropout
from pipeline.batch import BatchPlan
from pipeline.ds_config import zero_stage
from pipeline.engine import initialize_deepspeed, norm_of_gradients
from pipeline.recipe import OptimizerSection
from pipeline.startup import World
from pipeline.tasks.encoding import Collator, Sample
from pipeline.tasks.heads import count_targets
from pipeline.tasks.task import Predictor, Task

_ORDER, _DROPOUT = 10, 11  # first coordinates of what is drawn here; pipeline.samples names the others


@dataclass(frozen=True)
class Steps:
    """The steps of a run. samples: of the training set. warmup: share of the steps."""

    samples: int
    batch_size: int
    epochs: int
    warmup: float

    @property
    def of_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def total(self) -> int:
        return self.of_epoch * self.epochs

    def learning_rate(self, step: int, peak: float) -> float:
        """Of update `step` (0 is the first): a line up to the peak over the warm-up, and one towards 0, which the step
        after the last would have (Devlin et al. 2019, appendix A.2, as transformers' linear schedule has it)."""
        warmup = math.ceil(self.warmup * self.total)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (self.total - step) / max(1, self.total - warmup)

    def end_part(self, done: int, parts: int) -> bool:
        """Whether one of an epoch's equal `parts` ends after `done` steps."""
        place = (done - 1) % self.of_epoch + 1
        return place * parts // self.of_epoch > (place - 1) * parts // self.of_epoch

    def numbers(self, step: int, seed: int) -> NDArray[np.int64]:
        """The samples of a step [batch or fewer]: each comes once an epoch; the last step of one has the rest."""
        epoch, place = divmod(step, self.of_epoch)
        first = place * self.batch_size
        wanted = np.arange(first, min(first + self.batch_size, self.samples))
        return permute(wanted, self.samples, _ORDER, seed, epoch)


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the targets of the global batch, in nats (regression: squared error). grad_norm: before clipping;
    None where it overflowed and fp16 skips the step."""

    loss: float
    grad_norm: float | None


class Tuner:
    """One model in training on one task, with one seed.

    ds_config: complete. batches: of its global batch.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        optimizer: OptimizerSection,
        ds_config: dict[str, Any],
        batches: BatchPlan,
        collate: Collator,
        world: World,
        seed: int,
    ) -> None:
        self._task, self._batches, self._collate, self._world, self._seed = task, batches, collate, world, seed
        self._stage = zero_stage(ds_config)
        if world.device.type == "cpu":
            dropout.use_in(model)
        self.deepspeed, _, self._measures_norm = initialize_deepspeed(model, optimizer, ds_config)
        self._head = task.head(self.deepspeed, world.device)
        self.predictor = Predictor(self.deepspeed, self._head, collate, world, batches.micro_batch_size)

    def train_step(self, step: int, samples: list[Sample], learning_rate: float) -> StepResult:
        """One update over the global batch `samples`, of which each rank computes its micro-batches.

        Micro-batch m of rank r is run m x world + r of the samples, and has that number's dropout, so that neither the
        losses nor the patterns depend on the world size while the micro-batch stays. A last batch that is short is
        filled up with rows that do not count.
        """
        import torch
        from torch import distributed

        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        size, world = self._batches.micro_batch_size, self._world
        scale = world.size / max(1, count_targets(samples, self._task.is_text))
        total = torch.zeros(1, dtype=torch.float64, device=world.device)
        last = self._batches.gradient_accumulation_steps - 1
        for index in range(last + 1):
            run = index * world.size + world.rank
            chosen = samples[run * size : (run + 1) * size]
            missing = size - len(chosen)
            rows = self._collate([*chosen, *samples[:1] * missing], [1.0] * len(chosen) + [0.0] * missing)
            torch.manual_seed(seed_of(_DROPOUT, self._seed, step, run))
            loss, summed = self._head.loss(rows, scale)
            total += summed
            self.deepspeed.set_gradient_accumulation_boundary(index == last)
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            if index < last:
                self.deepspeed.step()
        norm = norm_of_gradients(self.deepspeed) if self._measures_norm else None
        self.deepspeed.step()
        distributed.all_reduce(total)
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        finite = norm is not None and math.isfinite(norm)
        return StepResult(float(total) * scale / world.size, float(norm) if finite else None)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Writes an ordinary Hugging Face folder, replacing the one that is there; called on every rank."""
        weights = self.deepspeed._zero3_consolidated_16bit_state_dict() if self._stage == 3 else None
        with self._world.first_alone() as first:
            if first:
                with durable.replacing_folder(folder, overwrite=True) as temporary:
                    self.deepspeed.module.save_pretrained(temporary, state_dict=weights)
                    tokenizer.save_pretrained(temporary)

    def close(self) -> None:
        """Lets go of weights and optimizer, before another engine is made."""
        self.deepspeed.destroy()
