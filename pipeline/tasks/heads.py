"""What the output of a model is trained to and what is read from it, by kind of task.

A head's `loss` is a sum over targets, so that its caller can divide by the number of targets of the whole global batch.
"""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.heads import LossHead
from pipeline.tasks.encoding import Rows, Sample

if TYPE_CHECKING:
    import torch


class Head(Protocol):
    """A model with one kind of output."""

    def loss(self, rows: Rows, scale: float) -> "tuple[torch.Tensor, torch.Tensor]":
        """`scale` times the sum of the losses of the rows' targets, with gradients, and the plain sum, without."""
        ...

    def outputs(self, rows: Rows) -> list[NDArray[Any]]:
        """What the task reads of each row, float32."""
        ...


def count_targets(samples: list[Sample], is_text: bool) -> int:
    """Targets of some rows: each row is one, or, where text is learned, each of its tokens behind the prompt."""
    return sum(len(sample.input_ids) - int(sample.target[0]) for sample in samples) if is_text else len(samples)


class ClassificationHead:
    """Cross-entropy of a class, target (class,), or with one output the squared error of a score, target (score,).

    Outputs: the logits, or the score [classes].
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def loss(self, rows: Rows, scale: float) -> "tuple[torch.Tensor, torch.Tensor]":
        from torch.nn import functional

        logits = self._model(**rows.inputs).logits.float()
        if logits.shape[1] == 1:
            losses = (logits[:, 0] - rows.targets[:, 0].float()).square()
        else:
            losses = functional.cross_entropy(logits, rows.targets[:, 0].long(), reduction="none")
        total = (losses * rows.weights).sum()
        return total * scale, total.detach()

    def outputs(self, rows: Rows) -> list[NDArray[Any]]:
        return list(self._model(**rows.inputs).logits.float().cpu().numpy())


class SpanHead:
    """Mean of the cross-entropies of a span's first and last token over the row (Devlin et al. 2019, section 4.2),
    target (first, last). Outputs: logits of both [2, sequence]."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def loss(self, rows: Rows, scale: float) -> "tuple[torch.Tensor, torch.Tensor]":
        from torch.nn import functional

        losses = sum(
            functional.cross_entropy(logits, rows.targets[:, side].long(), reduction="none")
            for side, logits in enumerate(self._logits(rows))
        )
        total = (losses / 2 * rows.weights).sum()
        return total * scale, total.detach()

    def outputs(self, rows: Rows) -> list[NDArray[Any]]:
        import torch

        both = torch.stack(self._logits(rows), 1).cpu().numpy()
        lengths = rows.inputs["attention_mask"].sum(1).tolist()
        return [row[:, :length] for row, length in zip(both, lengths, strict=True)]

    def _logits(self, rows: Rows) -> "list[torch.Tensor]":
        output = self._model(**rows.inputs)
        padding = rows.inputs["attention_mask"] == 0
        return [
            logits.float().masked_fill(padding, float("-inf")) for logits in (output.start_logits, output.end_logits)
        ]


class TextHead:
    """Cross-entropy of the tokens behind a prompt, target (tokens of the prompt,), by a causal model.

    Outputs: their sum in nats and their number [2].
    """

    def __init__(self, model: Any, device: "torch.device") -> None:
        self._head = LossHead(model, device)

    def loss(self, rows: Rows, scale: float) -> "tuple[torch.Tensor, torch.Tensor]":
        # A micro-batch of filling rows alone has targets too, times 0: every rank runs backward over a graph.
        real = rows.weights > 0
        fills = not bool(real.any())
        trained, of_tokens, _ = self._run(rows, real | fills, 0.0 if fills else scale)
        return trained, of_tokens.sum() * (0.0 if fills else 1.0)

    def outputs(self, rows: Rows) -> list[NDArray[Any]]:
        import torch

        _, of_tokens, row = self._run(rows, torch.ones_like(rows.weights, dtype=torch.bool), 1.0)
        sums = np.zeros((len(rows.weights), 2), np.float32)
        np.add.at(sums, row.cpu().numpy(), np.stack([of_tokens.cpu().numpy(), np.ones(len(row))], 1))
        return list(sums)

    def _run(
        self, rows: Rows, chosen: "torch.Tensor", scale: float
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """The trained sum, the loss of each target and its row, of the `chosen` rows."""
        import torch

        ids, mask = rows.inputs["input_ids"], rows.inputs["attention_mask"]
        place = torch.arange(ids.shape[1], device=ids.device)
        is_target = (mask > 0) & (place >= rows.targets[:, :1]) & (place > 0) & chosen[:, None]
        row, column = is_target.nonzero(as_tuple=True)
        trained, of_tokens, *_ = self._head(
            row * ids.shape[1] + column - 1, ids[row, column], scale, **rows.inputs, use_cache=False
        )
        return trained, of_tokens, row
