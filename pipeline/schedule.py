"""The learning rate as a pure function of the step."""

import math

from pipeline.recipe import Recipe

# Of one_cycle's peak, where it starts: torch's OneCycleLR (div_factor) and fastai's.
_CYCLE_START = 1 / 25
# Of a run's steps, wsd's decay where the recipe does not say: as good as a cosine over the whole run (Hägele et al.
# 2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations).
_DECAY_FRACTION = 0.2


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of update `step` (0 is the first).

    Warm-up is linear from 0 and reaches the peak at update `warmup_steps`, counted from 1, or with the update that
    completes `warmup_tokens`. Then, with n = step + 1 the number of an update, w that of the one at the peak:

    cosine, linear: to `min_lr` at the last update along half a cosine (Loshchilov & Hutter 2017, SGDR, eq. 5) or a
    line. constant: the peak. inverse_sqrt: sqrt(w / n) of the peak, but at least `min_lr` (Vaswani et al. 2017,
    Attention Is All You Need, eq. 3). wsd: the peak, and over the last steps to `min_lr` along 1 - sqrt(progress) or a
    line (Hu et al. 2024, MiniCPM, section 4; Hägele et al. 2024, section 3). one_cycle: a cosine up to the peak from a
    25th of it, and one down to `min_lr` (Smith 2018, Super-Convergence; as torch's OneCycleLR, without its cycle of
    momenta).
    """
    schedule, peak, last = recipe.schedule, recipe.optimizer.lr, recipe.max_steps - 1
    low, warmup = schedule.min_lr, _warmup_steps(recipe)
    if step < warmup and schedule.type == "one_cycle":
        # Its cosine begins at the first update and ends at the peak's.
        first, share = _warmup_share(recipe, 0), _warmup_share(recipe, step)
        risen = 1 - _half_cosine((share - first) / (1 - first)) if first < 1 else 1.0
        return peak * (_CYCLE_START + (1 - _CYCLE_START) * risen)
    if step < warmup:
        return peak * _warmup_share(recipe, step)
    match schedule.type:
        case "constant":
            return peak
        case "inverse_sqrt":
            return max(low, peak * math.sqrt(warmup / (step + 1)))
        case "wsd":
            steps = schedule.decay_steps or round((schedule.decay_fraction or _DECAY_FRACTION) * recipe.max_steps)
            progress = _progress(step, max(warmup, last - steps), last)
            share = 1 - (math.sqrt(progress) if schedule.decay_shape == "1-sqrt" else progress)
        case "cosine":
            share = _half_cosine(_progress(step, warmup, last))
        case "one_cycle":
            share = _half_cosine(_progress(step, warmup - 1, last))
        case "linear":
            share = 1 - _progress(step, warmup, last)
    return low + (peak - low) * share


def _warmup_steps(recipe: Recipe) -> int:
    """Updates of the warm-up; the last of them has the peak."""
    tokens = recipe.schedule.warmup_tokens
    if tokens is None:
        return recipe.schedule.warmup_steps
    return recipe.training.batch_sizes.steps_for(-(-tokens // recipe.data.sequence_length))


def _warmup_share(recipe: Recipe, step: int) -> float:
    """How much of the warm-up is done with update `step`; in tokens it follows a ramp of the batch."""
    tokens = recipe.schedule.warmup_tokens
    if tokens is None:
        return (step + 1) / recipe.schedule.warmup_steps
    return min(1.0, recipe.training.batch_sizes.trained(step + 1) * recipe.data.sequence_length / tokens)


def _progress(step: int, first: int, last: int) -> float:
    """From 0 at update `first` and before to 1 at `last` and after."""
    return min(1.0, max(0, step - first) / max(1, last - first))


def _half_cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))
