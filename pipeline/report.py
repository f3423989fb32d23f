"""What a run says of its data and its losses, in words and in the fields of `metrics.jsonl`."""

import math
from typing import Any

from pipeline.batch import BatchPlan
from pipeline.data import Data
from pipeline.engine import Losses
from pipeline.recipe import Recipe


def describe_data(data: Data, samples: int) -> list[str]:
    """A line a corpus: where it is, what is planned of it, and its epochs in a run of `samples` samples; and what could
    not be checked."""
    consumed = data.train.order.consumed(samples)
    length = data.train.sequence_length
    lines = []
    for corpus, size, share in zip(data.corpora, data.train.sizes, consumed.tolist(), strict=True):
        named = f"{corpus.name}: " if len(data.corpora) > 1 else ""
        packing = corpus.plan.settings.packing
        lines.append(
            f"{named}{corpus.shards.folder}, {size:,} samples of {length} tokens ({packing}), {share / size:.2f} epochs"
        )
    return [f"data      {line}" for line in (*lines, *data.notes)]


def describe_batches(recipe: Recipe, batches: BatchPlan) -> list[str]:
    """Batches and their ramp, and the samples that are passed over."""
    sizes = recipe.training.batch_sizes
    tokens = batches.global_batch_size * recipe.data.sequence_length
    ramp = "".join(f", {size} from step {start + 1}" for start, size in sorted(sizes.stages.items()) if start)
    lines = [f"batch     {batches}, {tokens:,} tokens a step{ramp}"]
    if sizes.left_out:
        passed = ", ".join(f"{count:,} before step {step + 1}" for step, count in sorted(sizes.left_out.items()))
        lines.append(f"skipped   samples: {passed}")
    return lines


def step_values(losses: Losses, data: Data, samples: int) -> dict[str, Any]:
    """`pair_loss` where there are pairs; and `corpora`, where there are several: of each, `loss` (null where the step
    had none of it) and `epochs` consumed after `samples` samples."""
    values: dict[str, Any] = {} if losses.pair_loss is None else {"pair_loss": losses.pair_loss}
    if len(data.corpora) > 1:
        consumed = data.train.order.consumed(samples)
        values["corpora"] = {
            corpus.name: {"loss": loss, "epochs": int(share) / size}
            for corpus, loss, share, size in zip(
                data.corpora, losses.of_corpora, consumed, data.train.sizes, strict=True
            )
        }
    return values


def hyperparameters(recipe: Recipe, model_type: str, parameters: int, engine: str) -> dict[str, bool | str | float]:
    """The fields by which runs are compared. engine: ZeRO stage, precision and optimizer in words."""
    named = recipe.model.config if isinstance(recipe.model.config, str) else recipe.model.config.get("base", model_type)
    sizes = recipe.training.batch_sizes.stages
    return {
        "objective": recipe.objective,
        "model": str(named),
        "parameters": parameters,
        "sequence_length": recipe.data.sequence_length,
        "packing": recipe.data.packing,
        "global_batch_size": max(sizes.values()),
        "max_steps": recipe.max_steps,
        "optimizer": recipe.optimizer.type,
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "ema_decay": recipe.optimizer.ema_decay or 0.0,
        "schedule": recipe.schedule.type,
        "warmup_steps": recipe.schedule.warmup_steps,
        "engine": engine,
        "seed": recipe.seed,
    }


def validation_values(losses: Losses, data: Data) -> dict[str, Any]:
    """`loss`, `perplexity`, `accuracy` (share of the targets that have the highest logit), `bits_per_byte` of a causal
    model on one corpus whose text's size is known, `pair_loss` where there are pairs, and `corpora`, where there are
    several: the loss of each."""
    values: dict[str, Any] = {"loss": losses.loss, "perplexity": math.exp(min(losses.loss, 700.0))}
    values["accuracy"] = losses.accuracy
    shards = data.corpora[0].shards
    if len(data.corpora) == 1 and shards.text_bytes and data.corpora[0].plan.settings.objective == "causal":
        values["bits_per_byte"] = losses.loss / math.log(2) * sum(shards.tokens) / shards.text_bytes
    if losses.pair_loss is not None:
        values["pair_loss"] = losses.pair_loss
    if len(data.corpora) > 1:
        names = (corpus.name for corpus in data.corpora)
        values["corpora"] = dict(zip(names, losses.of_corpora, strict=True))
    return values
