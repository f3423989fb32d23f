"""The learning rate as a pure function of the step."""

import math

from pipeline.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of update `step` (0 is the first).

    Warm-up is linear and reaches the peak at update `warmup_steps`; then the rate falls to `min_lr` at the last
    update, along half a cosine (Loshchilov & Hutter 2017, SGDR, eq. 5) or a line, or stays.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, recipe.max_steps - 1 - schedule.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.type == "cosine" else 1 - progress
    return schedule.min_lr + (peak - schedule.min_lr) * share
