"""Plans the training samples of a shard set: which documents are held out, how many samples there are.

The plan is small, whatever the corpus: a shard's documents are split in two runs, training first, held-out last, and
the samples of a split are equal stretches of its tokens, shard after shard ("concatenate": every token is used but
fewer than one sample's at the end). Packing again for another length or objective never tokenizes again.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import read_json
from data_prep.shards import ShardSet

SUMMARY = "Plan the samples of a shard set for an objective and a sequence length."
EXAMPLES = """\
  python -m data_prep pack --shards data/shards --objective causal --sequence_length 1024
  python -m data_prep pack --shards data/shards --objective mlm --sequence_length 512 --validation_fraction 0.01
"""
OBJECTIVES = ("causal", "mlm")
PLAN_VERSION = 1
DEFAULT_VALIDATION_FRACTION = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=Path, required=True, metavar="D", help="folder of token shards")
    parser.add_argument("--objective", choices=OBJECTIVES, required=True, help="causal (GPT) or mlm (BERT)")
    parser.add_argument("--sequence_length", type=int, required=True, metavar="N", help="tokens of a sample")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=DEFAULT_VALIDATION_FRACTION,
        help="share of the documents that is held out (default: %(default)s)",
    )


@dataclass(frozen=True)
class Split:
    """One side of the held-out split.

    first_document, end_document: its documents [first, end) in each shard.
    tokens: its tokens in each shard, ends of documents included.
    samples: how many whole samples they give.
    """

    first_document: tuple[int, ...]
    end_document: tuple[int, ...]
    first_token: tuple[int, ...]
    tokens: tuple[int, ...]
    samples: int


@dataclass(frozen=True)
class Plan:
    """How a shard set is cut into samples; a pure function of the shards and of the fields up to `stride`.

    stride: tokens of the stream from one sample to the next. A causal sample reads one more, the last target.
    """

    shards_fingerprint: str
    objective: str
    sequence_length: int
    validation_fraction: float
    stride: int
    train: Split
    validation: Split
    packing: str = "concatenate"
    version: int = PLAN_VERSION


def make_plan(shards: ShardSet, objective: str, sequence_length: int, validation_fraction: float) -> Plan:
    """Plans the samples. Held out are the last documents of each shard, in exact proportion over all shards so far:
    appending shards leaves the split of those before as it was.

    Raises UserError for lengths or fractions that leave no training sample.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}, expected 0 <= fraction < 1")
    if sequence_length < 8:
        raise UserError(f"sequence_length is {sequence_length}, expected at least 8 tokens")
    # A masked-LM sample has [CLS] before and [SEP] behind its stretch.
    stride = sequence_length if objective == "causal" else sequence_length - 2
    overlap = 1 if objective == "causal" else 0
    cuts = []
    seen = 0
    for documents in shards.documents:
        held_out = int((seen + documents) * validation_fraction) - int(seen * validation_fraction)
        cuts.append(documents - held_out)
        seen += documents
    cut_tokens = [shards.shard(index).document_offset(cut) for index, cut in enumerate(cuts)]

    def split(first: list[int], end: tuple[int, ...] | list[int], first_token: list[int], tokens: list[int]) -> Split:
        samples = max(0, (sum(tokens) - overlap) // stride)
        return Split(tuple(first), tuple(end), tuple(first_token), tuple(tokens), samples)

    plan = Plan(
        shards_fingerprint=shards.fingerprint,
        objective=objective,
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        stride=stride,
        train=split([0] * len(cuts), cuts, [0] * len(cuts), cut_tokens),
        validation=split(
            cuts,
            shards.documents,
            cut_tokens,
            [n - cut for n, cut in zip(shards.tokens, cut_tokens, strict=True)],
        ),
    )
    if plan.train.samples == 0:
        raise UserError(
            f"{shards.folder}: {sum(cut_tokens)} training tokens give no sample of {sequence_length} tokens;"
            " take a smaller sequence_length or more text"
        )
    return plan


def plan_path(shards: Path, objective: str, sequence_length: int, validation_fraction: float) -> Path:
    """Where the plan of these settings is kept, beside the shards."""
    return shards / "samples" / f"{objective}-{sequence_length}-validation-{float(validation_fraction)!r}.json"


def write_plan(folder: Path, plan: Plan) -> Path:
    path = plan_path(folder, plan.objective, plan.sequence_length, plan.validation_fraction)
    durable.write_json(path, asdict(plan))
    return path


def read_plan(shards: ShardSet, objective: str, sequence_length: int, validation_fraction: float) -> Plan | None:
    """The plan of these settings, or None when there is none yet or it was made of other shards.

    Raises UserError when the file is damaged.
    """
    path = plan_path(shards.folder, objective, sequence_length, validation_fraction)
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        if raw["version"] != PLAN_VERSION or raw["shards_fingerprint"] != shards.fingerprint:
            return None
        return Plan(**{**raw, "train": _read_split(raw["train"]), "validation": _read_split(raw["validation"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it and pack again") from None


def _read_split(raw: dict[str, Any]) -> Split:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    return Split(**values)


def describe(plan: Plan) -> str:
    """One line a split: documents, tokens, samples, tokens left over."""
    lines = []
    for name, split in (("train", plan.train), ("validation", plan.validation)):
        documents = sum(split.end_document) - sum(split.first_document)
        tokens = sum(split.tokens)
        used = split.samples * plan.stride
        lines.append(
            f"  {name:<10} {documents:>10,} documents {tokens:>14,} tokens {split.samples:>10,} samples"
            f" ({used / tokens if tokens else 0:.2%} of the tokens used)"
        )
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    shards = ShardSet.open(arguments.shards)
    settings = (arguments.objective, arguments.sequence_length, arguments.validation_fraction)
    plan = make_plan(shards, *settings)
    if read_plan(shards, *settings) == plan:
        print(f"{plan_path(shards.folder, *settings)}: up to date")
    else:
        print(f"{write_plan(shards.folder, plan)}: {plan.packing}, {plan.sequence_length} tokens a sample")
    print(describe(plan))
    if shards.tokenizer_fingerprint is None:
        print("  shards of another program: training checks the tokenizer that its recipe names, as far as ids tell")
