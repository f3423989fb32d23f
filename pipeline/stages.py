"""Values that change at stated steps of a run: a mapping from a step to the value from that step on."""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")


def value_at(stages: Mapping[int, Value], step: int) -> Value:
    """The value of the last stage that begins at or before `step`."""
    steps = sorted(stages)
    return stages[steps[bisect.bisect_right(steps, step) - 1]]


def interpolated(points: float | Mapping[int, float], step: int) -> float:
    """A number, or the line through its values at stated steps, at `step`; flat beyond the first and the last."""
    if not isinstance(points, Mapping):
        return points
    steps = sorted(points)
    after = bisect.bisect_right(steps, step)
    if after == 0 or after == len(steps):
        return points[steps[min(after, len(steps) - 1)]]
    left, right = steps[after - 1], steps[after]
    share = (step - left) / (right - left)
    return points[left] + (points[right] - points[left]) * share


def continued(before: Mapping[int, Value], after: Mapping[int, Value], step: int) -> dict[int, Value]:
    """What a run has that was `before` until `step` and is `after` from then on."""
    stages = {start: value for start, value in sorted(before.items()) if start < step}
    later = {step: value_at(after, step)} | {start: value for start, value in sorted(after.items()) if start > step}
    for start, value in later.items():
        if not stages or stages[max(stages)] != value:
            stages[start] = value
    return stages


@dataclass(frozen=True)
class BatchSizes:
    """Samples of each step, and which samples those are.

    stages: samples of one optimizer step, over all ranks, from each step on; the first stage is at step 0. left_out:
    samples that are passed over before a step takes its own.
    """

    stages: Mapping[int, int]
    left_out: Mapping[int, int] = field(default_factory=dict)

    def at(self, step: int) -> int:
        return value_at(self.stages, step)

    def first_sample(self, step: int) -> int:
        """The number of the first sample of `step`."""
        return self.trained(step) + sum(count for start, count in self.left_out.items() if start <= step)

    def consumed(self, steps: int) -> int:
        """How far into the order of samples the run is after `steps` steps."""
        return self.trained(steps) + sum(count for start, count in self.left_out.items() if start < steps)

    def trained(self, step: int) -> int:
        """Samples of the steps before `step`."""
        steps = sorted(self.stages)
        ends = [*steps[1:], max(step, steps[-1])]
        return sum(
            (min(end, step) - start) * self.stages[start]
            for start, end in zip(steps, ends, strict=True)
            if start < step
        )

    def steps_for(self, samples: int) -> int:
        """Steps that train on at least so many samples."""
        steps = sorted(self.stages)
        for start, end in zip(steps, [*steps[1:], None], strict=True):
            need = -(-(samples - self.trained(start)) // self.stages[start])
            if end is None or start + need <= end:
                return start + need
        raise AssertionError("the last stage has no end")
