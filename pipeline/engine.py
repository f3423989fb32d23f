"""The DeepSpeed engine of a run: optimizer, precision, and steps whose gradients are the global batch's."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_LAST_FLAG = 52  # float64 adds integers below 2^53 exactly


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
class Site:
    """A micro-batch of a rank (those from 52 on count as one)."""

    rank: int
    micro_batch: int


@dataclass(frozen=True)
class StepResult:
    """The same on every rank.

    losses: of the global batch, before the update. grad_norm: before clipping; None where the ds_config turns it off,
    or where it is not finite. applied: weights and optimizer were changed. non_finite: whose losses were not finite.
    scaling: fp16 left the step out to look for its loss scale. requests: how many ranks asked for what.
    own_seconds: of this rank alone, from where all ranks began together to the end of its first forward pass.
    """

    losses: Losses
    grad_norm: float | None
    applied: bool = True
    non_finite: tuple[Site, ...] = ()
    scaling: bool = False
    requests: tuple[int, ...] = ()
    own_seconds: float = 0.0


def initialize_deepspeed(
    model: "torch.nn.Module", recipe: OptimizerSection, ds_config: dict[str, Any]
) -> "tuple[Any, torch.optim.Optimizer, bool]":
    """DeepSpeed's engine around the model, the optimizer within it, and whether the norm of the gradients has to be
    measured before a step (`norm_of_gradients`): in plain data parallelism in fp32 DeepSpeed clips without keeping it,
    and never leaves a step out.

    ds_config: complete (pipeline.ds_config.complete_ds_config).
    """
    import deepspeed

    optimizer = make_optimizer(model, recipe, ds_config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    unsharded, in_fp32 = zero_stage(ds_config) == 0, precision(ds_config) == "fp32"
    if unsharded and not in_fp32:
        # The step of its initialisation (FP16_UnfusedOptimizer) would count as the first.
        optimizer.state.clear()
    return engine, optimizer, unsharded and in_fp32


def norm_of_gradients(engine: Any) -> "torch.Tensor":
    from torch.nn.utils import get_total_norm

    return get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


class Engine:
    """A DeepSpeed engine that takes whole optimizer steps.

    ds_config: complete (pipeline.ds_config.complete_ds_config). seed: of dropout, which is a pure function of (seed,
    step, number of the micro-batch in the global batch). corpora: how many the batches come from. vocabulary: of the
    model without padding. z_loss, label_smoothing: as in pipeline.heads.trained_loss. dtype: that attention is computed
    in. before_update: called in every step after the backward pass, before weights and optimizer states change; whoever
    else changes them calls it first.
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
        import torch

        self.world = world
        self.before_update: Callable[[], None] = lambda: None
        self._seed = seed
        self._corpora = corpora
        self.dtype = getattr(torch, TORCH_DTYPES[compute_precision(ds_config)])
        if world.device.type == "cpu":
            dropout.use_in(model)
        self.deepspeed, self._optimizer, self._measures_norm = initialize_deepspeed(model, recipe, ds_config)
        if recipe.ema_decay is not None:
            ema.keep_average(self._optimizer, recipe.ema_decay)
        self._autocasts = precision(ds_config) != compute_precision(ds_config)
        self._scales_loss = compute_precision(ds_config) == "fp16"
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

    def train_step(
        self,
        step: int,
        batches: Sequence[DeviceBatch],
        learning_rate: float,
        *,
        discard: bool = False,
        requests: Sequence[bool] = (),
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches of step `step`.

        requests: what this rank asks all ranks for; they travel with the token counts, so all act after the same step.
        discard: as if the loss were not finite.

        The loss is the sum over the target tokens of all ranks and micro-batches divided by their number (and the mean
        over the pairs, where there are any), and the gradients are those of that loss: each micro-batch's sum is
        divided by the global count, and what DeepSpeed divides by once more when it averages over ranks is multiplied
        back.

        Where a loss or the norm of the gradients is not finite, all ranks leave weights and optimizer as they are:
        every ZeRO stage measures the global norm before it touches them, plain fp32 does so here, and a loss that is
        not finite makes its gradients such.
        """
        import torch
        from torch import distributed

        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        pairs = sum(0 if batch.pair_labels is None else len(batch.pair_labels) for batch in batches)
        targets = sum(batch.target_count for batch in batches)
        counts = torch.tensor([targets, pairs, *map(int, requests)], device=self.world.device)
        distributed.all_reduce(counts)
        all_targets, all_pairs, *asked = counts.tolist()
        clock = Clock(self.world.device)
        token_scale, pair_scale = (self.world.size / max(count, 1) for count in (all_targets, all_pairs))
        total = torch.zeros(2, 1 + self._corpora, dtype=torch.float64, device=self.world.device)
        # Of each rank a number whose bits are micro-batches; others leave it 0, so a sum gathers them.
        flags = torch.zeros(self.world.size, dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(batches):
            self._seed_dropout(step, index)
            of_batch, sums = self._losses(batch, token_scale)
            if index == 0:
                clock.stop()
            total += sums
            loss = of_batch.trained
            if of_batch.of_pairs is not None:
                loss = loss + of_batch.of_pairs.sum() * pair_scale
            gate = loss.detach() * 0  # 0 exactly, or NaN
            flags[self.world.rank] += gate.isnan() * 2.0 ** min(index, _LAST_FLAG)
            # DeepSpeed counts micro-batches by a number that a batch-size ramp changes.
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.deepspeed.backward(loss * (math.nan if discard else 1 + gate), scale_wrt_gas=False)
            if index < len(batches) - 1:
                self.deepspeed.step()
        norm = norm_of_gradients(self.deepspeed) if self._measures_norm else None
        if norm is not None and not norm.isfinite():
            self._leave_out()
        self.before_update()
        self.deepspeed.step()
        gathered = torch.cat((total.flatten(), flags))
        distributed.all_reduce(gathered)
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        applied = self.deepspeed.was_step_applied()
        non_finite = sites_of(gathered[total.numel() :].tolist())
        return StepResult(
            losses=Losses.of(gathered[: total.numel()].view_as(total)),
            grad_norm=float(norm) if norm is not None and math.isfinite(norm) else None,
            applied=applied,
            non_finite=non_finite,
            scaling=self._scales_loss and not applied and not non_finite and not discard,
            requests=tuple(asked),
            own_seconds=clock.seconds(),
        )

    def _seed_dropout(self, step: int, index: int) -> None:
        import torch

        torch.manual_seed(seed_of(_DROPOUT, self._seed, step, index * self.world.size + self.world.rank))

    def local_gradients(self, step: int, index: int, batch: DeviceBatch) -> "list[torch.Tensor]":
        """This rank's gradients of micro-batch `index` of step `step`, not reduced; nothing is changed.

        Not at ZeRO stage 3. DeepSpeed's hooks, which stand behind the accumulation into `.grad`, do not see them.
        """
        import torch

        parameters = [one for one in self.deepspeed.module.parameters() if one.requires_grad]
        around, self.head.model = self.head.model, self.deepspeed.module
        try:
            self._seed_dropout(step, index)
            with torch.autocast(self.world.device.type, self.dtype, enabled=self._autocasts):
                of_batch, _ = self._losses(batch)
            loss = of_batch.trained if of_batch.of_pairs is None else of_batch.trained + of_batch.of_pairs.sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.head.model = around
        return [gradient for gradient in found if gradient is not None]

    def _leave_out(self) -> None:
        """Has DeepSpeed count the step that follows without updating anything, as its other optimizers do."""
        self.deepspeed.zero_grad()
        self.deepspeed.set_gradient_accumulation_boundary(False)
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1

    def check_average(self) -> None:
        """Raises UserError when a checkpoint has restored states without the average of the weights."""
        ema.check_average(self._optimizer)

    def averaged_weights(self) -> "contextlib.AbstractContextManager[None]":
        """While open, the model computes with the average of its weights (pipeline.ema); opened on every rank."""
        self.before_update()
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


def sites_of(flags: Sequence[float]) -> tuple[Site, ...]:
    """The micro-batches whose bits are set in each rank's number."""
    return tuple(
        Site(rank, bit) for rank, value in enumerate(flags) for bit in range(_LAST_FLAG + 1) if int(value) >> bit & 1
    )


class Clock:
    """Seconds of this rank's work between its making and `stop`, also where a GPU does it later; read without waiting
    for more than that work."""

    def __init__(self, device: "torch.device") -> None:
        self._on_gpu = device.type == "cuda"
        self._began, self._ended = self._now(), self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._ended = self._now()

    def seconds(self) -> float:
        if not self._on_gpu:
            return float(self._ended - self._began)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000
