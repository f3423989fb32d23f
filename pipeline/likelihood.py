"""How likely a model finds sequences of tokens: a causal model's log-probabilities, a masked one's pseudo-likelihood.

A causal model sees a sequence as training shows a document: behind the end of the one before (`start`), which predicts
the first token. Batches are made of rows of similar length and as many tokens as fit, so memory does not depend on how
many sequences there are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import SpecialTokens
from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 8192
_LOGITS = 1 << 26  # numbers in the logits of a batch: 256 MB in float32
_LOGITS_AT_ONCE = 1 << 24  # of which in float32

Ids = Sequence[int] | NDArray[np.integer[Any]]
Done = Callable[[int], object]
"""Called after each batch with the tokens that it scored."""


class TokenScores(NamedTuple):
    """What a causal model says of the tokens of one sequence.

    log_probabilities: of each token after those before it, in nats [tokens], float64.
    ranks: how many tokens the model finds likelier; 0 is its first choice [tokens], int64.
    """

    log_probabilities: NDArray[np.float64]
    ranks: NDArray[np.int64]


class Window(NamedTuple):
    """Part of a sequence that a model sees at once: its tokens begin to end, of which those from `scored` on count."""

    begin: int
    scored: int
    end: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Stretches of at most `length` tokens that count each token once; all but the first begin `stride` tokens after
    the one before and give their own first count at least length - stride tokens of context."""
    found = [Window(0, 0, min(tokens, length))]
    while found[-1].end < tokens:
        begin = found[-1].begin + stride
        found.append(Window(begin, found[-1].end, min(tokens, begin + length)))
    return found


def token_log_probabilities(
    model: Any,
    sequences: Sequence[Ids],
    start: int,
    *,
    stride: int | None = None,
    batch_tokens: int = _BATCH_TOKENS,
    done: Done = lambda tokens: None,
) -> list[TokenScores]:
    """The scores of each sequence's tokens under a causal model of transformers, which is in eval mode.

    start: the id that stands before a sequence (the end of a document). A sequence longer than the model's positions
    is seen in windows that begin `stride` tokens apart (default: half the positions), so that all but the first
    positions / 2 tokens have at least positions - stride tokens before them. batch_tokens: of a forward pass, padding
    included; fewer where the vocabulary is large.
    """
    import torch

    from pipeline.model import longest_input

    length = longest_input(model.config)
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"the stride is {stride}, expected 1 to the model's {length} positions")
    inputs = [np.concatenate(([start], np.asarray(ids, dtype=np.int64))) for ids in sequences]
    scores = [TokenScores(np.empty(len(ids) - 1), np.empty(len(ids) - 1, dtype=np.int64)) for ids in inputs]
    # Input i predicts token i of the sequence, so windows over inputs are windows over tokens.
    pieces = [
        (number, window)
        for number, ids in enumerate(inputs)
        if len(ids) > 1
        for window in windows(len(ids) - 1, length, stride)
    ]
    batch_tokens = min(batch_tokens, max(1, _LOGITS // model.config.get_text_config().vocab_size))
    for batch in in_batches([window.end - window.begin for _, window in pieces], batch_tokens):
        rows = [pieces[index] for index in batch]
        padded = filled_up([inputs[number][window.begin : window.end] for number, window in rows], fill=start)
        with torch.no_grad():  # padding stands behind what is looked at, where a causal model does not see it
            logits = model(input_ids=torch.from_numpy(padded).to(model.device), use_cache=False).logits
        for row, (number, window) in enumerate(rows):
            counted = slice(window.scored, window.end)
            targets = torch.from_numpy(inputs[number][window.scored + 1 : window.end + 1]).to(logits.device)
            of_row = logits[row, window.scored - window.begin : window.end - window.begin]
            log_probabilities, ranks = target_scores(of_row, targets)
            scores[number].log_probabilities[counted] = log_probabilities.cpu().numpy()
            scores[number].ranks[counted] = ranks.cpu().numpy()
        done(sum(window.end - window.scored for _, window in rows))
    return scores


def target_scores(logits: "torch.Tensor", targets: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Log-probabilities in nats [rows], float32, and ranks [rows], int64, of `targets` [rows] under logits
    [rows, vocabulary], some rows at a time in float32."""
    import torch

    found, ranks = [], []
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for part, of_part in zip(logits.split(rows), targets.split(rows), strict=True):
        part = part.float()
        chosen = part.gather(1, of_part[:, None])
        found.append(chosen[:, 0] - part.logsumexp(-1))
        ranks.append((part > chosen).sum(-1))
    if not found:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.cat(found), torch.cat(ranks)


def pseudo_log_likelihood(
    model: Any,
    sequences: Sequence[Ids],
    special: SpecialTokens,
    *,
    batch_tokens: int = _BATCH_TOKENS,
    done: Done = lambda tokens: None,
) -> list[NDArray[np.float64]]:
    """log P(token | all others) in nats of each sequence's tokens [tokens] under a masked LM of transformers, which is
    in eval mode; their sum is the pseudo-log-likelihood (Salazar et al. 2020, "Masked Language Model Scoring",
    section 2.1): each token is masked in a copy of its own.

    Sequences are without [CLS] and [SEP], which are put around them where the tokenizer has both. Of a sequence longer
    than the model's positions each token sees the stretch around it that fits. Raises UserError when the tokenizer has
    no mask token.
    """
    import torch

    from pipeline.heads import LossHead
    from pipeline.model import longest_input

    if special.mask is None:
        raise UserError("the tokenizer has no mask_token, which pseudo-likelihood needs")
    before, after = frame(special)
    room = longest_input(model.config) - len(before) - len(after)
    head = LossHead(model, model.device)
    scores = [np.empty(len(ids)) for ids in sequences]
    copies = [(number, token) for number, ids in enumerate(sequences) for token in range(len(ids))]
    sizes = [len(before) + min(len(sequences[number]), room) + len(after) for number, _ in copies]
    padding = special.padding if special.padding is not None else special.mask
    for batch in in_batches(sizes, batch_tokens):
        rows, places, targets = [], [], []
        width = sizes[batch[0]]
        for row, (number, token) in enumerate(copies[index] for index in batch):
            begin = min(max(0, token - room // 2), max(0, len(sequences[number]) - room))
            ids = np.array([*before, *sequences[number][begin : begin + room], *after], dtype=np.int64)
            place = len(before) + token - begin
            targets.append(int(ids[place]))
            places.append(row * width + place)
            ids[place] = special.mask
            rows.append(ids)
        padded = torch.from_numpy(filled_up(rows, fill=padding)).to(model.device)
        seen = torch.arange(width)[None] < torch.tensor([[len(ids)] for ids in rows])
        arguments = {} if seen.all() else {"attention_mask": seen.long().to(model.device)}
        with torch.no_grad():
            where, ids_at = (torch.tensor(values, device=model.device) for values in (places, targets))
            losses = head(where, ids_at, 1.0, input_ids=padded, **arguments)[1]
        for index, loss in zip(batch, losses.tolist(), strict=True):
            number, token = copies[index]
            scores[number][token] = -loss
        done(len(batch))
    return scores


def frame(special: SpecialTokens) -> tuple[list[int], list[int]]:
    """What BERT-like models have before and behind a text."""
    if special.classification is None or special.separator is None:
        return [], []
    return [special.classification], [special.separator]


def in_batches(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar size, longest first: width x rows is at most batch_tokens, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if batch and sizes[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def filled_up(rows: Sequence[NDArray[np.int64]], fill: int) -> NDArray[np.int64]:
    """Rows filled up on the right to the first's length, the longest [batch, sequence]."""
    padded = np.full((len(rows), len(rows[0])), fill, dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded
