"""What fine-tuning asks of a task, and how its samples go through a model on all ranks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from pipeline.startup import World
from pipeline.tasks.encoding import Collator, Sample, by_length
from pipeline.tasks.heads import Head

if TYPE_CHECKING:
    import torch

Outputs = dict[str, list[NDArray[Any]]]


class Task(Protocol):
    """One task on one model's tokens.

    title: as its benchmark writes it. model_class: transformers' class of the model. config: what its configuration
    says of the task. is_text: whether tokens behind a prompt are the targets. train; dev: by held-out set. shown: the
    metrics that tables show.
    """

    @property
    def title(self) -> str: ...
    @property
    def model_class(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def is_text(self) -> bool: ...
    @property
    def train(self) -> list[Sample]: ...
    @property
    def dev(self) -> dict[str, list[Sample]]: ...
    @property
    def shown(self) -> tuple[str, ...]: ...

    def head(self, model: Any, device: "torch.device") -> Head: ...

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """Metrics of the dev sets' outputs, by name."""
        ...

    def score(self, metrics: dict[str, float]) -> float:
        """By which one evaluation is better than another: more is better."""
        ...

    def predict(self, model: Any, predictor: "Predictor", folder: Path) -> dict[str, float]:
        """Writes what the task's benchmark takes to `folder`, on rank 0; called on every rank with the finished model.

        Returns metrics that only the finished model gets (on rank 0).
        """
        ...


class Predictor:
    """Runs samples through a head on all ranks together.

    model: the module that is switched to evaluation. batch_size: rows of a micro-batch.
    """

    def __init__(self, model: Any, head: Head, collate: Collator, world: World, batch_size: int) -> None:
        self._model, self._head, self._collate = model, head, collate
        self.world, self.batch_size = world, batch_size

    def outputs(self, samples: list[Sample], title: str) -> list[NDArray[Any]]:
        """The head's output of each sample, on rank 0; nothing elsewhere. title: of the progress bar.

        Every rank runs equally many micro-batches, since ZeRO-3 gathers weights in each.
        """
        import sys

        import torch
        from torch import distributed
        from tqdm import tqdm

        world = self.world
        runs = list(by_length(samples, self.batch_size * world.size))
        mine: list[tuple[int, NDArray[Any]]] = []
        bar = tqdm(
            runs,
            desc=title,
            unit=" batches",
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not (world.is_first and sys.stderr.isatty()),
        )
        self._model.eval()
        with torch.no_grad():
            for run in bar:
                chosen = run[world.rank :: world.size]
                filled = chosen or run[:1]
                found = self._head.outputs(self._collate([samples[n] for n in filled], [1.0] * len(filled)))
                mine += zip(chosen, found, strict=False)
        self._model.train()
        gathered: list[Any] = [None] * world.size if world.is_first else []
        distributed.gather_object(mine, gathered if world.is_first else None)
        by_number = dict(pair for rank in gathered for pair in rank)
        return [by_number[number] for number in range(len(samples))] if world.is_first else []
