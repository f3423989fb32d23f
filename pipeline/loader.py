"""From samples to the device: which rows a rank takes, batches made ahead of the step, and their transfer."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError
from pipeline.batch import BatchPlan
from pipeline.order import Places
from pipeline.samples import Batch, Samples
from pipeline.stages import BatchSizes
from pipeline.startup import RankError
from pipeline.token_drop import TokenDrop

if TYPE_CHECKING:
    import torch

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class DeviceBatch:
    """A `samples.Batch` on the device. input_ids, target_ids and token_types are int64 there."""

    input_ids: "torch.Tensor"
    target_ids: "torch.Tensor"
    targets: "torch.Tensor | None"
    boundaries: "torch.Tensor | None"
    longest: int
    corpus: "torch.Tensor"
    target_count: int
    token_types: "torch.Tensor | None" = None
    pair_labels: "torch.Tensor | None" = None
    kept_positions: "torch.Tensor | None" = None


def to_device(batch: Batch, device: "torch.device") -> DeviceBatch:
    """Moves a batch; to a GPU from pinned memory, without waiting for it: whoever uses it on another stream waits for
    this one. Ids travel as the shards keep them (2 bytes each where they can) and are widened there."""
    import torch

    def moved(array: "np.ndarray[Any, Any] | None", dtype: Any = None) -> "torch.Tensor | None":
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.contiguous().pin_memory().to(device, non_blocking=True)
        return tensor if dtype is None else tensor.to(dtype)

    return DeviceBatch(
        input_ids=moved(batch.input_ids, torch.int64),
        target_ids=moved(batch.target_ids, torch.int64),
        targets=moved(batch.targets),
        boundaries=moved(batch.boundaries),
        longest=batch.longest,
        corpus=moved(batch.places.corpus),
        target_count=batch.target_count,
        token_types=moved(batch.token_types, torch.int64),
        pair_labels=moved(batch.pair_labels),
        kept_positions=moved(batch.kept_positions),
    )


def step_batches(
    samples: Samples, step: int, sizes: BatchSizes, batches: BatchPlan, rank: int, drop: TokenDrop | None = None
) -> list[Batch]:
    """One rank's micro-batches of one step: micro-batch m of rank r is the (m x world + r)-th run of the step's
    samples."""
    numbers = sizes.first_sample(step) + np.arange(sizes.at(step), dtype=np.int64)
    runs = numbers.reshape(-1, batches.world_size, batches.micro_batch_size)
    made = [samples.batch(run, step) for run in runs[:, rank]]
    if drop is None:
        return made
    length = samples.sequence_length
    return [replace(batch, kept_positions=drop.positions(samples.keys(batch.places), step, length)) for batch in made]


def validation_batches(samples: Samples, count: int, batches: BatchPlan, rank: int, step: int = 0) -> Iterator[Batch]:
    """One rank's share of `count` held-out samples (all of them if there are fewer), of each corpus equally many as far
    as it has them; every rank gets equally many batches, filled up with rows that have no targets."""
    places = samples.held_out(count)
    found, micro = len(places.sample), batches.micro_batch_size
    for start in range(0, found, micro * batches.world_size):
        numbers = start + rank * micro + np.arange(micro)
        real = numbers < found
        chosen = np.where(real, numbers, 0)
        yield samples.batch_at(Places(places.corpus[chosen], places.epoch[chosen], places.sample[chosen]), step, real)


def _side_stream(device: "torch.device") -> Any:
    """A stream for copies beside the computation; None where there is none."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.Stream(device)


class Ahead:
    """Makes the batches of coming steps in a thread, and moves them, so that the step waits for neither.

    make: the batches of a step, called for first_step, first_step + 1, ... below end_step.
    """

    def __init__(
        self, make: Callable[[int], list[Batch]], first_step: int, end_step: int, device: "torch.device"
    ) -> None:
        self._ready: queue.Queue[tuple[list[DeviceBatch], Any] | BaseException] = queue.Queue(_STEPS_AHEAD)
        self._stop = threading.Event()
        self._device = device
        self._stream = _side_stream(device)
        self._thread = threading.Thread(target=self._fill, args=(make, first_step, end_step), daemon=True)
        self._thread.start()

    def _fill(self, make: Callable[[int], list[Batch]], first_step: int, end_step: int) -> None:
        item: tuple[list[DeviceBatch], Any] | BaseException
        for step in range(first_step, end_step):
            try:
                item = self._moved(make(step))
            except BaseException as error:  # handed to the training thread, which raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def _moved(self, batches: list[Batch]) -> tuple[list[DeviceBatch], Any]:
        """The batches on the device, and the event that says when they are there (None: at once)."""
        if self._stream is None:
            return [to_device(batch, self._device) for batch in batches], None
        import torch

        with torch.cuda.stream(self._stream):
            moved = [to_device(batch, self._device) for batch in batches]
            return moved, self._stream.record_event()

    def next(self) -> tuple[list[DeviceBatch], float]:
        """The batches of the next step, and the seconds that it waited for them.

        Raises RankError where making them met a UserError, and what else it met.
        """
        started = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, UserError):
            raise RankError(str(item))
        if isinstance(item, BaseException):
            raise item
        batches, event = item
        if event is not None:
            import torch

            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for batch in batches:  # their memory is not to be given out again before this stream has read it
                for attribute in fields(batch):
                    value = getattr(batch, attribute.name)
                    if isinstance(value, torch.Tensor):
                        value.record_stream(stream)
        return batches, time.perf_counter() - started

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
