"""Text that shows what a model has learned: held-out prompts continued, masked tokens of held-out text filled in.

Every rank computes the same, so that it works where weights are sharded as well, and nothing is drawn: a prompt is
continued with the likeliest token each time.
"""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encoding import Encoder
from pipeline.attention import document_arguments
from pipeline.loader import to_device
from pipeline.samples import Batch, Samples

if TYPE_CHECKING:
    import torch

    from pipeline.heads import LossHead

PROMPT_TOKENS = 24
NEW_TOKENS = 24
SHOWN_TOKENS = 64
"""Of a masked sample."""


def text_samples(
    head: "LossHead", samples: Samples, encoder: Encoder, count: int, device: "torch.device", dtype: "torch.dtype"
) -> list[str]:
    """`count` texts, or as many as there are held-out samples, of a few lines each; called on every rank.

    dtype: that attention is computed in.
    """
    import torch

    batch = samples.batch_at(samples.held_out(count))
    training = head.model.training
    head.model.eval()
    try:
        with torch.no_grad():
            if samples.is_causal:
                return list(_continuations(head, batch, encoder, device))
            return list(_filled(head, batch, encoder, device, dtype))
    finally:
        head.model.train(training)


def _continuations(head: "LossHead", batch: Batch, encoder: Encoder, device: "torch.device") -> Iterator[str]:
    """Of each row, the beginning of its longest document."""
    import torch

    rows, sequence = batch.input_ids.shape
    prompts, references = [], []
    for row, (begin, end) in enumerate(_longest_documents(batch)):
        length = min(PROMPT_TOKENS, max(1, (end - begin) // 2))
        ids = batch.input_ids[row].astype(np.int64)
        prompts.append(ids[begin : begin + length])
        references.append(ids[begin + length : min(end, begin + length + NEW_TOKENS)])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = min(int(lengths.max()) + NEW_TOKENS, sequence)
    ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.from_numpy(prompt)
    first = torch.arange(rows, device=device) * width
    arguments = {"use_cache": False} if getattr(_config(head), "use_cache", False) else {}
    count = width - int(lengths.max())
    for new in range(count):
        # What stands behind a row's last token is not seen from there.
        last = first + lengths + new - 1
        ids.view(-1)[last + 1] = head.logits(last, input_ids=ids, **arguments).argmax(1)
    for prompt, reference, found in zip(prompts, references, ids.cpu().numpy(), strict=True):
        continued = found[len(prompt) : len(prompt) + count]
        yield "\n".join(
            [
                *_wrapped("prompt     ", encoder.decode(prompt)),
                *_wrapped("continued  ", encoder.decode(continued)),
                *_wrapped("held-out   ", encoder.decode(reference)),
            ]
        )


def _filled(
    head: "LossHead", batch: Batch, encoder: Encoder, device: "torch.device", dtype: "torch.dtype"
) -> Iterator[str]:
    """The beginning of each row, as {right} or {wrong>right} where a token was to be predicted."""
    moved = to_device(batch, device)
    shape = (len(batch.input_ids), batch.input_ids.shape[1])
    arguments: dict[str, Any] = document_arguments(moved.boundaries, moved.longest, shape, _config(head), dtype)
    if moved.token_types is not None:
        arguments["token_type_ids"] = moved.token_types
    assert moved.targets is not None
    predicted = np.zeros(batch.labels.size, dtype=np.int64)
    predicted[batch.targets] = head.logits(moved.targets, input_ids=moved.input_ids, **arguments).argmax(1).cpu()
    for ids, labels, guesses in zip(batch.input_ids, batch.labels, predicted.reshape(shape), strict=True):
        parts, begin = [], 0
        for place in [*np.flatnonzero(labels[:SHOWN_TOKENS] >= 0).tolist(), min(SHOWN_TOKENS, len(ids))]:
            parts.append(encoder.decode(ids[begin:place]))
            if place < min(SHOWN_TOKENS, len(ids)):
                right, guess = int(labels[place]), int(guesses[place])
                wrong = "" if guess == right else f"{encoder.decode([guess])}>"
                parts.append(f" {{{wrong}{encoder.decode([right])}}} ")
            begin = place + 1
        yield "\n".join(_wrapped("", "".join(parts)))


def _longest_documents(batch: Batch) -> Iterator[tuple[int, int]]:
    """Begin and end of each row's longest document, in the row."""
    rows, sequence = batch.input_ids.shape
    boundaries = np.arange(rows + 1) * sequence if batch.boundaries is None else batch.boundaries
    begins, ends = boundaries[:-1], boundaries[1:]
    for row in range(rows):
        inside = np.flatnonzero(begins // sequence == row)
        longest = inside[np.argmax(ends[inside] - begins[inside])]
        first = row * sequence
        yield int(begins[longest]) - first, min(int(ends[longest]) - first, sequence)


def _wrapped(title: str, text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 100, initial_indent=title, subsequent_indent=" " * len(title))


def _config(head: "LossHead") -> Any:
    return getattr(head.model, "module", head.model).config
