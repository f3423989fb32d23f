"""`python -m pipeline.fill_mask`: what an exported BERT puts in the place of [MASK]."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError, exit_status
from pipeline.text_lines import bar, in_groups, read_lines

if TYPE_CHECKING:
    from pipeline.exported import Exported

EXAMPLES = """\
examples:
  python -m pipeline.fill_mask --model exported/bert --text "The mean of the [MASK] along an axis."
  python -m pipeline.fill_mask --model exported/bert --input texts.txt --top_k 1 --json

columns:
  probability, token, text with the token in its place; of several masks each is filled alone
"""

_TEXTS_AT_ONCE = 1024
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Filling:
    """text: with this token in the place of one mask, and of that one alone."""

    probability: float
    token: str
    text: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.fill_mask",
        description="The likeliest tokens in the place of each [MASK], as a masked language model finds them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a masked model")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", nargs="+", metavar="TEXT", help="texts with masks")
    texts.add_argument("--input", metavar="FILE", help="a text a line, UTF-8; - is stdin")
    parser.add_argument("--top_k", type=int, default=5, metavar="K", help="tokens a mask (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object a text instead of tables")
    return parser


def fillings(exported: "Exported", tokenizer: Any, texts: Sequence[str], top_k: int) -> list[list[list[Filling]]]:
    """Of each text, of each of its masks, the `top_k` likeliest tokens.

    tokenizer: transformers', which recognises masks in text. Raises UserError for a text without a mask, or one that is
    longer than the model's positions.
    """
    import torch

    from pipeline.likelihood import filled_up, in_batches
    from pipeline.model import longest_input

    mask, longest = tokenizer.mask_token_id, longest_input(exported.model.config)
    encoded = [np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not (ids == mask).any():
            raise UserError(f"{text[:80]!r} has no {tokenizer.mask_token}; write it where a token is to be found")
        if len(ids) > longest:
            raise UserError(f"{text[:80]!r} has {len(ids)} tokens, the model {longest} positions; shorten it")
    found: list[list[list[Filling]]] = [[] for _ in texts]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else mask
    for batch in in_batches([len(ids) for ids in encoded], _BATCH_TOKENS):
        rows = [encoded[index] for index in batch]
        seen = filled_up([np.ones(len(ids), dtype=np.int64) for ids in rows], fill=0)
        inputs = {"input_ids": filled_up(rows, fill=padding), "attention_mask": seen}
        with torch.no_grad():
            logits = exported.model(
                **{name: torch.from_numpy(values).to(exported.model.device) for name, values in inputs.items()}
            ).logits
        for row, index in enumerate(batch):
            for place in np.flatnonzero(encoded[index] == mask).tolist():
                likeliest = logits[row, place].float().softmax(-1).topk(top_k)
                found[index].append(
                    [
                        Filling(probability, tokenizer.decode([token]), _with(tokenizer, encoded[index], place, token))
                        for probability, token in zip(*(values.tolist() for values in likeliest), strict=True)
                    ]
                )
    return found


def _with(tokenizer: Any, ids: Any, place: int, token: int) -> str:
    """The text of `ids` with another token at one place, without what frames it; other masks show as such."""
    changed = [int(one) for one in ids]
    changed[place] = token
    frame = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    text: str = tokenizer.decode([one for one in changed if one not in frame])
    return text


def _shown(text: str, masks: list[list[Filling]]) -> Iterator[str]:
    yield text
    for number, found in enumerate(masks, 1):
        if len(masks) > 1:
            yield f"  mask {number}"
        width = max(len(filling.token) for filling in found)
        for filling in found:
            yield f"  {filling.probability:8.4f}  {filling.token:<{width}}  {filling.text}"


def fill_mask(arguments: argparse.Namespace) -> int:
    from pipeline.exported import load_exported, objective_of

    objective_of(arguments.model, "mlm")
    texts = iter(arguments.text) if arguments.text is not None else read_lines(arguments.input)
    exported = load_exported(arguments.model, "mlm")
    from transformers import AutoTokenizer

    vocabulary = exported.model.config.get_text_config().vocab_size
    if not 1 <= arguments.top_k <= vocabulary:
        raise UserError(f"--top_k is {arguments.top_k}, expected 1 to the {vocabulary} tokens that there are")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.mask_token_id is None:
        raise UserError(f"--model {arguments.model}: its tokenizer has no mask_token")
    with bar("fill_mask", "text") as progress:
        for group in in_groups(texts, _TEXTS_AT_ONCE):
            for text, masks in zip(group, fillings(exported, tokenizer, group, arguments.top_k), strict=True):
                if arguments.json:
                    values = {"text": text, "masks": [[vars(filling) for filling in found] for found in masks]}
                    print(json.dumps(values, ensure_ascii=False))
                else:
                    print("\n".join(_shown(text, masks)))
            progress.update(len(group))
    return 0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: fill_mask(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
