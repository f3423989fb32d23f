"""Packs the samples of a shard set: plans them, and reports how many tokens are used, cut and padded."""

import argparse
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError
from data_prep.mix import is_mixture, read_mixture
from data_prep.packing import FRAME, OF_SENTENCES, PACKINGS, PAIR_FRAME
from data_prep.plan import (
    DEFAULT_SHORT_SEQ_PROB,
    DEFAULT_VALIDATION_FRACTION,
    SPLITS,
    PackSettings,
    Plan,
    plan_folder,
    prepare_plan,
)
from data_prep.shards import ShardSet

SUMMARY = "Plan the samples of a shard set for an objective and a sequence length."
EXAMPLES = """\
  python -m data_prep pack --shards data/shards --objective causal --sequence_length 1024
  python -m data_prep pack --shards data/shards --objective causal --sequence_length 1024 --packing best_fit
  python -m data_prep pack --shards data/shards --objective mlm --sequence_length 512 --packing full_sentences
  python -m data_prep pack --shards data/shards --objective mlm --sequence_length 512 --compare

packings:
  concatenate     equal stretches of the corpus; every token is used, documents are cut where a stretch ends
  best_fit        whole documents, the next that fits best; only one that is longer than a sample is cut
  document        one document a sample, padded; a longer one gives several samples
  full_sentences  mlm: whole sentences until the next does not fit, over the ends of documents (RoBERTa)
  nsp, sop        mlm: two stretches of sentences of one document; training swaps the second for another document's
                  (BERT's next-sentence prediction) or turns the two around (ALBERT's sentence order)
"""
PICTURE_NAME = "packing.svg"
_CHUNK = 1 << 22
_BAR = 40
_COLOURS = {"whole": "#2a7f62", "cut": "#d9a441", "frame": "#7a8793", "padding": "#d8dde1"}
_WORDS = {
    "whole": "tokens of documents that are whole in their sample",
    "cut": "tokens of documents that are cut",
    "frame": "[CLS] and [SEP]",
    "padding": "padding",
}
_MARKS = {"whole": "█", "cut": "▒", "frame": "·", "padding": " "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=Path, required=True, metavar="D", help="folder of token shards, or of a mixture"
    )
    parser.add_argument("--objective", choices=sorted(PACKINGS), required=True, help="causal (GPT) or mlm (BERT)")
    parser.add_argument("--sequence_length", type=int, required=True, metavar="N", help="tokens of a sample")
    parser.add_argument(
        "--packing",
        choices=sorted({name for names in PACKINGS.values() for name in names}),
        default="concatenate",
        help="how documents become samples, see below (default: %(default)s)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=DEFAULT_VALIDATION_FRACTION,
        help="share of the documents that is held out (default: %(default)s)",
    )
    parser.add_argument(
        "--short_seq_prob",
        type=float,
        help="share of the samples that are meant to be shorter, of a random length; full_sentences, nsp and sop"
        f" (default: {DEFAULT_SHORT_SEQ_PROB} for nsp and sop, as BERT's, 0 otherwise)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="report every packing of the objective that these shards allow"
    )


@dataclass(frozen=True)
class Usage:
    """Where the positions and tokens of a split went.

    whole, cut: tokens in samples, of documents that stand whole in one and of documents that do not. frame: positions
    of [CLS] and [SEP]. padding: positions without a token. left_out: tokens in no sample.
    cut_documents: documents that are not whole in one sample; needless: those of them that would fit in one.
    """

    samples: int
    whole: int
    cut: int
    frame: int
    padding: int
    left_out: int
    documents: int
    cut_documents: int
    needless: int

    @property
    def positions(self) -> int:
        return self.whole + self.cut + self.frame + self.padding


def measure(shards: ShardSet, plan: Plan, split: str) -> Usage:
    """Counts a split of a plan, shard by shard."""
    side, settings = plan.split(split), plan.settings
    drops_end = settings.objective == "mlm" and settings.packing != "concatenate" and shards.end_of_document is not None
    room = settings.sequence_length - (PAIR_FRAME if settings.is_pairs else FRAME if settings.objective == "mlm" else 0)
    whole = cut = cut_documents = needless = left_out = 0
    parts = _concatenated if settings.packing == "concatenate" else _indexed
    for lengths, pieces, used in parts(shards, plan, split, drops_end):
        intact = (pieces <= 1) & (used == lengths)
        whole += int(lengths[intact].sum())
        cut += int(used[~intact].sum())
        cut_documents += int(np.count_nonzero(~intact & (used > 0)))
        needless += int(np.count_nonzero(~intact & (used > 0) & (lengths <= room)))
        left_out += int((lengths - used).sum())
    if settings.objective == "causal":
        frame = 0
    elif settings.is_pairs:
        frame = PAIR_FRAME * side.samples
    else:
        frame = FRAME * (side.pieces or side.samples)
    documents = sum(side.end_document) - sum(side.first_document)
    padding = side.samples * settings.sequence_length - whole - cut - frame
    return Usage(side.samples, whole, cut, frame, padding, left_out, documents, cut_documents, needless)


def _lengths(shards: ShardSet, plan: Plan, split: str, index: int) -> NDArray[np.int64]:
    side = plan.split(split)
    documents = np.arange(side.first_document[index], side.end_document[index] + 1)
    return shards.shard(index).offsets_of(documents)


def _concatenated(shards: ShardSet, plan: Plan, split: str, _: bool) -> Any:
    """Of each shard: its documents' lengths, the samples that each is in, and its tokens in samples [documents]."""
    side, stride = plan.split(split), plan.settings.stride
    first = 1 if plan.settings.objective == "causal" else 0  # the first token is an input only
    end = first + side.samples * stride
    base = 0
    for index, tokens in enumerate(side.tokens):
        offsets = _lengths(shards, plan, split, index)
        begin, stop = offsets[:-1] - offsets[0] + base, offsets[1:] - offsets[0] + base
        used = np.clip(stop, first, end) - np.clip(begin, first, end)
        yield (
            np.diff(offsets),
            np.where(used > 0, (stop - 1 - first) // stride - (begin - first) // stride + 1, 0),
            used,
        )
        base += tokens


def _indexed(shards: ShardSet, plan: Plan, split: str, drops_end: bool) -> Any:
    """As `_concatenated`; the samples of a shard stand one after the other."""
    side = plan.split(split)
    _, pieces = plan.pieces(split)
    step = 2 if plan.settings.is_pairs else 1
    bounds = np.cumsum((0, *shards.tokens))
    done = 0
    for index in range(len(shards.names)):
        offsets = _lengths(shards, plan, split, index)
        lengths = np.diff(offsets) - drops_end
        count, used = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
        while done < side.pieces:
            chunk = pieces[done : done + _CHUNK]
            starts = chunk["start"][::step]
            beyond = starts >= bounds[index + 1]
            here = int(beyond.argmax()) if beyond.any() else len(starts)
            sizes = chunk["length"][: here * step].reshape(-1, step).sum(axis=1)
            document = np.searchsorted(offsets, starts[:here] - bounds[index], side="right") - 1
            count += np.bincount(document, minlength=len(count))
            used += np.bincount(document, weights=sizes, minlength=len(used)).astype(np.int64)
            done += here * step
            if here < len(starts):
                break
        yield lengths, count, used


def describe(plan: Plan, usages: Sequence[Usage]) -> str:
    """Numbers of a plan, two lines a split, with a bar of its positions."""
    lines = []
    for name, usage in zip(SPLITS, usages, strict=True):
        tokens = sum(plan.split(name).tokens)
        lines.append(
            f"  {name:<10} {usage.documents:>10,} documents {tokens:>14,} tokens {usage.samples:>10,} samples"
            f" ({_share(usage.left_out, tokens)} of the tokens left out)"
        )
        if usage.samples:
            lines.append(f"  {'':<10} {bar(usage)} {_shares(usage)}")
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole if whole else 0:.2%}"


def _shares(usage: Usage) -> str:
    cut = f"{usage.cut_documents:,} documents cut, {usage.needless:,} of them would fit in a sample"
    return (
        f"{_share(usage.whole, usage.positions)} whole, {_share(usage.cut, usage.positions)} cut ({cut}),"
        f" {_share(usage.padding, usage.positions)} padded"
    )


def bar(usage: Usage) -> str:
    """The positions of the samples as a bar of text."""
    ends = np.cumsum([getattr(usage, part) for part in _MARKS]) * _BAR / max(1, usage.positions)
    widths = np.diff(np.rint(ends).astype(int), prepend=0)
    return "|" + "".join(mark * int(width) for mark, width in zip(_MARKS.values(), widths, strict=True)) + "|"


def picture(title: str, rows: Sequence[tuple[str, Usage]]) -> str:
    """An SVG with a bar a row: what the positions of its samples hold."""
    height = 64 + 34 * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height + 30}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="960" height="{height + 30}" fill="#fff"/><text x="16" y="26" font-size="15">{html.escape(title)}'
        "</text>",
    ]
    for number, (name, usage) in enumerate(rows):
        x, y = 150.0, 44 + 34 * number
        out.append(f'<text x="140" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>')
        for part, colour in _COLOURS.items():
            width = 560 * getattr(usage, part) / max(1, usage.positions)
            label = html.escape(f"{_WORDS[part]}: {getattr(usage, part):,}")
            box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"'
            out.append(f"<rect {box}><title>{label}</title></rect>")
            x += width
        padded = f"{_share(usage.padding, usage.positions)} padded, {usage.needless:,} needless cuts"
        out.append(f'<text x="722" y="{y + 16}">{padded}</text>')
    x = 16
    for part, colour in _COLOURS.items():
        out.append(f'<rect x="{x}" y="{height}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{x + 18}" y="{height + 11}">{html.escape(_WORDS[part])}</text>')
        x += 40 + 7 * len(_WORDS[part])
    return "\n".join([*out, "</svg>", ""])


def _settings(arguments: argparse.Namespace, packing: str) -> PackSettings:
    short = arguments.short_seq_prob
    if short is None or (arguments.compare and packing not in OF_SENTENCES):
        short = DEFAULT_SHORT_SEQ_PROB if packing in ("nsp", "sop") else 0.0
    return PackSettings(arguments.objective, arguments.sequence_length, packing, arguments.validation_fraction, short)


def main(arguments: argparse.Namespace) -> None:
    if not is_mixture(arguments.shards):
        pack(ShardSet.open(arguments.shards), arguments)
        return
    mixture = read_mixture(arguments.shards)
    for component in mixture.components:
        pack(mixture.open(component), arguments)


def pack(shards: ShardSet, arguments: argparse.Namespace) -> None:
    """Plans one shard set and prints what came of it."""
    packings = [arguments.packing]
    if arguments.compare:
        packings = [name for name in PACKINGS[arguments.objective] if name != "sop"]  # it cuts as nsp does
    rows = []
    for packing in packings:
        settings = _settings(arguments, packing)
        try:
            plan, made = prepare_plan(shards, settings)
        except UserError as error:
            if not arguments.compare:
                raise
            print(f"{packing}: {error}")
            continue
        print(f"{plan.folder}: {'made' if made else 'up to date'}")
        usages = [measure(shards, plan, split) for split in SPLITS]
        print(describe(plan, usages))
        rows.append((packing, usages[0]))
    title = f"{shards.folder}, {arguments.objective}, {arguments.sequence_length} tokens a sample: training positions"
    path = plan_folder(shards.folder, _settings(arguments, packings[0])) / PICTURE_NAME
    if arguments.compare:
        path = path.parent.with_name(f"{arguments.objective}-{arguments.sequence_length}-compared.svg")
    drawn = picture(title, rows).encode()
    if not path.exists() or path.read_bytes() != drawn:
        durable.write_bytes(path, drawn)
    print(f"  picture: {path}")
    if shards.tokenizer_fingerprint is None:
        print("  shards of another program: training checks the tokenizer that its recipe names, as far as ids tell")
