"""The DeepSpeed engine of a run: optimizer, precision, and steps whose gradients are the global batch's."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from data_prep.encoding import Encoder
from data_prep.randomness import seed_of
from pipeline import distributions, dropout, ema
from pipeline.attention import check_isolation
from pipeline.ds_config import TORCH_DTYPES, compute_precision, precision, zero_stage
from pipeline.heads import LossHead
from pipeline.loader import DeviceBatch, to_device
from pipeline.objective import BatchLosses, losses
from pipeline.optimizer import make_optimizer
from pipeline.recipe import OptimizerSection
from pipeline.samples import Batch, Samples
from pipeline.startup import World
from pipeline.text_samples import text_samples

if TYPE_CHECKING:
    import torch

_DROPOUT = 5  # first coordinate of the dropout seeds; see pipeline.samples for the others


@dataclass(frozen=True)
class Losses:
    """Means over a global batch or an evaluation, in nats.

    tokens: targets. loss: a target token. of_corpora: the same of each corpus, None where it had none. pair_loss: a
    pair, where the objective has pairs. accuracy: of an evaluation, the share of the targets whose logits are the
    highest.
    """

    tokens: int
    loss: float
    of_corpora: tuple[float | None, ...]
    pair_loss: float | None
    accuracy: float | None = None

    @staticmethod
    def of(sums: "torch.Tensor") -> "Losses":
        """sums: of the losses and of their number, of pairs first, then of each corpus's tokens [2, 1 + corpora]."""
        (pair_sum, *losses), (pairs, *counts) = sums.tolist()
        return Losses(
            tokens=int(sum(counts)),
            loss=sum(losses) / max(1, sum(counts)),
            of_corpora=tuple(loss / count if count else None for loss, count in zip(losses, counts, strict=True)),
            pair_loss=pair_sum / pairs if pairs else None,
        )


@dataclass(frozen=True)
class StepResult:
    """losses: of the global batch, before the update. grad_norm: before clipping; None where the ds_config turns it
    off, or where it overflowed and fp16 skips the step."""

    losses: Losses
    grad_norm: float | None


class Engine:
    """A DeepSpeed engine that takes whole optimizer steps.

    ds_config: complete (pipeline.ds_config.complete_ds_config). seed: of dropout, which is a pure function of (seed,
    step, micro-batch, rank). corpora: how many the batches come from. vocabulary: of the model without padding.
    z_loss, label_smoothing: as in pipeline.heads.trained_loss. dtype: that attention is computed in.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        recipe: OptimizerSection,
        ds_config: dict[str, Any],
        world: World,
        seed: int,
        corpora: int = 1,
        *,
        vocabulary: int | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        import deepspeed
        import torch

        self.world = world
        self._seed = seed
        self._corpora = corpora
        self.dtype = getattr(torch, TORCH_DTYPES[compute_precision(ds_config)])
        if world.device.type == "cpu":
            dropout.use_in(model)
        optimizer = make_optimizer(model, recipe, ds_config)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        unsharded, in_fp32 = zero_stage(ds_config) == 0, precision(ds_config) == "fp32"
        if unsharded and not in_fp32:
            # The step of its initialisation (FP16_UnfusedOptimizer) would count as the first.
            optimizer.state.clear()
        self._optimizer = optimizer
        if recipe.ema_decay is not None:
            ema.keep_average(optimizer, recipe.ema_decay)
        # In plain data parallelism in fp32 DeepSpeed clips without keeping the norm.
        self._measures_norm = unsharded and in_fp32
        self.head = LossHead(
            self.deepspeed, world.device, vocabulary=vocabulary, z_loss=z_loss, label_smoothing=label_smoothing
        )

    def check_isolation(self) -> None:
        """Raises UserError when documents of a sample see each other on this device; called on every rank."""
        check_isolation(self.deepspeed, self.world.device, self.dtype)

    def _losses(self, batch: DeviceBatch, scale: float = 1.0) -> tuple[BatchLosses, "torch.Tensor"]:
        """The losses, `scale` being that of what is trained, and their sums as `Losses.of` takes them."""
        import torch

        of_batch = losses(self.head, batch, self.dtype, scale)
        sums = torch.zeros(2, 1 + self._corpora, dtype=torch.float64, device=self.world.device)
        found = of_batch.of_tokens.double()
        if self._corpora == 1:
            sums[0, 1], sums[1, 1] = found.sum(), found.numel()
        else:
            sequence = batch.input_ids.shape[1]
            row = torch.arange(found.numel(), device=found.device) if batch.targets is None else batch.targets
            corpus = 1 + batch.corpus[row // sequence]
            sums[0].index_add_(0, corpus, found)
            sums[1].index_add_(0, corpus, torch.ones_like(found))
        if of_batch.of_pairs is not None:
            assert batch.pair_labels is not None
            sums[0, 0], sums[1, 0] = of_batch.of_pairs.detach().double().sum(), (batch.pair_labels >= 0).sum()
        return of_batch, sums

    def train_step(self, step: int, batches: Sequence[DeviceBatch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of step `step`.

        The loss is the sum over the target tokens of all ranks and micro-batches divided by their number (and the mean
        over the pairs, where there are any), and the gradients are those of that loss: each micro-batch's sum is
        divided by the global count, and what DeepSpeed divides by once more when it averages over ranks is multiplied
        back.
        """
        import torch
        from torch import distributed

        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        pairs = sum(0 if batch.pair_labels is None else len(batch.pair_labels) for batch in batches)
        counts = torch.tensor([sum(batch.target_count for batch in batches), pairs], device=self.world.device)
        distributed.all_reduce(counts)
        token_scale, pair_scale = (self.world.size / max(count, 1) for count in counts.tolist())
        total = torch.zeros(2, 1 + self._corpora, dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(seed_of(_DROPOUT, self._seed, step, index, self.world.rank))
            of_batch, sums = self._losses(batch, token_scale)
            total += sums
            loss = of_batch.trained
            if of_batch.of_pairs is not None:
                loss = loss + of_batch.of_pairs.sum() * pair_scale
            # DeepSpeed counts micro-batches by a number that a batch-size ramp changes.
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            if index < len(batches) - 1:
                self.deepspeed.step()
        norm = self._norm_of_gradients() if self._measures_norm else None
        self.deepspeed.step()
        distributed.all_reduce(total)
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        finite = norm is not None and math.isfinite(norm)
        return StepResult(Losses.of(total), float(norm) if finite else None)

    def _norm_of_gradients(self) -> "torch.Tensor":
        from torch.nn.utils import get_total_norm

        return get_total_norm([p.grad for p in self.deepspeed.module.parameters() if p.grad is not None])

    def check_average(self) -> None:
        """Raises UserError when a checkpoint has restored states without the average of the weights."""
        ema.check_average(self._optimizer)

    def averaged_weights(self) -> "contextlib.AbstractContextManager[None]":
        """While open, the model computes with the average of its weights (pipeline.ema); opened on every rank."""
        return ema.averaged(self.deepspeed, self._optimizer)

    def own_weights(self) -> "list[torch.Tensor]":
        """Copies of this rank's float32 weights, for `distributions` after the next step."""
        return [weight.detach().clone() for weight in distributions.own_weights(self.deepspeed, self._optimizer)]

    def distributions(self, before: "list[torch.Tensor]") -> Iterator[tuple[str, distributions.Distribution]]:
        """As pipeline.distributions.distributions, since `own_weights` gave `before`; used up on every rank."""
        return distributions.distributions(self.deepspeed, self._optimizer, before)

    def text_samples(self, samples: Samples, encoder: Encoder, count: int) -> list[str]:
        """As pipeline.text_samples.text_samples; called on every rank."""
        return text_samples(self.head, samples, encoder, count, self.world.device, self.dtype)

    def evaluate(self, batches: Iterable[Batch]) -> Losses:
        """Losses over the batches of all ranks (each rank gives equally many)."""
        import torch
        from torch import distributed

        total = torch.zeros(3, 1 + self._corpora, dtype=torch.float64, device=self.world.device)
        self.deepspeed.eval()
        with torch.no_grad():
            for batch in batches:
                of_batch, sums = self._losses(to_device(batch, self.world.device))
                assert of_batch.correct is not None
                total[:2] += sums
                total[2, 0] += of_batch.correct.sum()
        self.deepspeed.train()
        distributed.all_reduce(total)
        found = Losses.of(total[:2])
        return replace(found, accuracy=float(total[2, 0]) / max(1, found.tokens))
