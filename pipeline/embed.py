"""`python -m pipeline.embed`: a vector for each line of a file, from the hidden states of an exported BERT."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError, exit_status
from pipeline.text_lines import STDIN, bar, read_lines

if TYPE_CHECKING:
    from pipeline.exported import Exported

EXAMPLES = """\
examples:
  python -m pipeline.embed --model exported/bert --input sentences.txt --output vectors.npy
  python -m pipeline.embed --model exported/bert --input sentences.txt --query "the mean of an array" --top_k 10

The file is numpy's: float32 [lines, width of the model], read by numpy.load. A BERT that was only pretrained gives
vectors that tell topics apart; for close sentences fine-tune it.
"""

POOLINGS = ("mean", "cls")
_BATCH_TOKENS = 8192


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.embed",
        description="Vectors of the lines of a file, and the lines that are nearest to a query.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a masked model")
    parser.add_argument("--input", required=True, metavar="FILE", help="a text a line, UTF-8; - is stdin")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file of the vectors (.npy)")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="of the last layer: the mean over a line's tokens, frame included, or the first one's, [CLS]"
        " (default: %(default)s)",
    )
    parser.add_argument("--normalize", action="store_true", help="vectors of length 1")
    parser.add_argument("--query", metavar="TEXT", help="show the lines nearest to this text, by cosine")
    parser.add_argument(
        "--top_k", type=int, default=5, metavar="K", help="lines to show of --query (default: %(default)s)"
    )
    return parser


def sentence_vectors(
    exported: "Exported",
    texts: Sequence[str],
    pooling: str = "mean",
    *,
    batch_tokens: int = _BATCH_TOKENS,
    done: Callable[[int], object] = lambda texts: None,
) -> tuple[NDArray[np.float32], int]:
    """Vectors [texts, width], and how many texts were cut to the model's positions.

    Each text is seen as [CLS] text [SEP], where the tokenizer has both. done: called with the number of texts of a
    batch.
    """
    import torch

    from pipeline.likelihood import filled_up, frame, in_batches
    from pipeline.model import longest_input

    model, special = exported.model, exported.tokenizer.special
    before, after = frame(special)
    room = longest_input(model.config) - len(before) - len(after)
    encoded = exported.encoder.encode_batch(list(texts))
    rows = [np.array([*before, *ids[:room], *after], dtype=np.int64) for ids in encoded]
    vectors = np.zeros((len(texts), model.config.get_text_config().hidden_size), dtype=np.float32)
    padding = special.padding if special.padding is not None else special.end_of_document
    for batch in in_batches([len(row) for row in rows], batch_tokens):
        if not len(rows[batch[0]]):
            continue  # nothing but empty lines without a frame
        seen = torch.from_numpy(filled_up([np.ones_like(rows[index]) for index in batch], fill=0)).to(model.device)
        input_ids = torch.from_numpy(filled_up([rows[index] for index in batch], fill=padding)).to(model.device)
        with torch.no_grad():
            hidden = model.base_model(input_ids=input_ids, attention_mask=seen).last_hidden_state.float()
        if pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        vectors[batch] = pooled.cpu().numpy()
        done(len(batch))
    return vectors, sum(len(ids) > room for ids in encoded)


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1; those of 0 stay [vectors, width]."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def embed(arguments: argparse.Namespace) -> int:
    from pipeline.exported import load_exported, objective_of

    objective_of(arguments.model, "mlm")
    if arguments.output is None and arguments.query is None:
        raise UserError("nothing to do: give --output FILE, --query TEXT or both")
    if arguments.top_k < 1:
        raise UserError(f"--top_k is {arguments.top_k}, expected 1 or more")
    if arguments.input != STDIN and not Path(arguments.input).is_file():
        raise UserError(f"--input {arguments.input} is no file")
    lines = list(read_lines(arguments.input))
    exported = load_exported(arguments.model, "mlm")
    with bar("embed", "line", len(lines)) as progress:
        vectors, cut = sentence_vectors(exported, lines, arguments.pooling, done=progress.update)
    if arguments.normalize:
        vectors = normalized(vectors)
    if arguments.output is not None:
        with durable.replacing(arguments.output) as file:
            np.save(file, vectors)
        print(f"{arguments.output}: {len(vectors):,} vectors of {vectors.shape[1]} numbers ({arguments.pooling})")
    if cut:
        print(f"{cut:,} lines were longer than the model's positions and cut")
    if arguments.query is not None:
        query, _ = sentence_vectors(exported, [arguments.query], arguments.pooling)
        cosines = normalized(vectors) @ normalized(query)[0]
        for line in np.argsort(-cosines, kind="stable")[: arguments.top_k].tolist():
            print(f"{cosines[line]:7.4f}  line {line + 1}: {lines[line]}")
    return 0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: embed(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
