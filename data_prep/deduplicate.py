"""Documents without exact and near duplicates, and without those that share text with evaluation data."""

import argparse
from pathlib import Path

from data_prep.decontamination import DEFAULT_NGRAM, DecontaminateOptions
from data_prep.documents import ReadOptions, add_input_arguments
from data_prep.duplicates import METHODS, DistinctSource, DuplicateOptions
from data_prep.errors import UserError
from data_prep.minhash import MAX_NGRAM, MinHashOptions, options_for
from data_prep.parts import Execution, add_work_arguments, positive_integer, working
from data_prep.stream import Source
from data_prep.write_documents import finish_documents, write_documents

SUMMARY = "Remove exact and near duplicates, and documents that share n-grams with evaluation data."
EXAMPLES = """\
  python -m data_prep deduplicate --input 'clean/*.jsonl' --output_dir data/unique
  python -m data_prep deduplicate --input 'clean/*.jsonl' --output_dir data/unique --methods exact
  python -m data_prep deduplicate --input 'clean/*.jsonl' --output_dir data/unique --threshold 0.8 \\
      --decontaminate squad-dev.json glue/*.tsv
"""
MAX_PERMUTATIONS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the documents")
    add_duplicate_arguments(parser)
    add_decontaminate_arguments(parser)
    add_work_arguments(parser)


def add_duplicate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `duplicate_options`."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="exact: same text but for case and white space; near: similar by MinHash (default: both)",
    )
    parser.add_argument(
        "--ngram", type=positive_integer, default=5, metavar="N", help="words of an n-gram (default: %(default)s)"
    )
    parser.add_argument("--bands", type=positive_integer, metavar="B", help="bands of the hashes (default: 14)")
    parser.add_argument("--rows", type=positive_integer, metavar="R", help="hashes of a band (default: 8)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="in place of --bands and --rows: choose those that err least about this Jaccard similarity",
    )
    parser.add_argument(
        "--permutations",
        type=positive_integer,
        default=112,
        metavar="P",
        help="with --threshold: at most so many hashes (default: %(default)s)",
    )


def add_decontaminate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `decontaminate_options`."""
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="GLOB",
        help="evaluation files: JSON, JSONL or lines of text or tab-separated cells, unless a field is named",
    )
    parser.add_argument(
        "--decontaminate_field",
        default="",
        metavar="FIELD",
        help="key or column of their texts, in any format of --input (default: every string, every cell)",
    )
    parser.add_argument(
        "--decontaminate_ngram",
        type=positive_integer,
        default=DEFAULT_NGRAM,
        metavar="N",
        help="words of an n-gram that must not be shared (default: %(default)s)",
    )
    parser.add_argument(
        "--decontaminate_matches",
        type=positive_integer,
        default=1,
        metavar="M",
        help="n-grams in common from which on a document is removed (default: %(default)s)",
    )


def duplicate_options(arguments: argparse.Namespace) -> DuplicateOptions:
    """From the flags of `add_duplicate_arguments`; raises UserError for values that do not go together."""
    if arguments.ngram > MAX_NGRAM:
        raise UserError(f"--ngram {arguments.ngram}: expected at most {MAX_NGRAM}")
    methods = tuple(method for method in METHODS if method in arguments.methods)
    threshold = arguments.threshold
    if threshold is None:
        minhash = MinHashOptions(arguments.ngram, arguments.bands or 14, arguments.rows or 8)
    elif arguments.bands or arguments.rows:
        raise UserError("--threshold chooses bands and rows: give either it or --bands and --rows")
    elif not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: expected a similarity between 0 and 1")
    elif arguments.permutations > MAX_PERMUTATIONS:
        raise UserError(f"--permutations {arguments.permutations}: expected at most {MAX_PERMUTATIONS}")
    else:
        minhash = options_for(threshold, arguments.permutations, arguments.ngram)
    if minhash.permutations > MAX_PERMUTATIONS:
        raise UserError(
            f"--bands {minhash.bands} --rows {minhash.rows} are {minhash.permutations} hashes a document, expected at"
            f" most {MAX_PERMUTATIONS}"
        )
    return DuplicateOptions(methods, minhash)


def decontaminate_options(arguments: argparse.Namespace) -> DecontaminateOptions | None:
    """From the flags of `add_decontaminate_arguments`, None without files; raises UserError as its `of` does."""
    if arguments.decontaminate_ngram > MAX_NGRAM:
        raise UserError(f"--decontaminate_ngram {arguments.decontaminate_ngram}: expected at most {MAX_NGRAM}")
    if not arguments.decontaminate:
        return None
    return DecontaminateOptions.of(
        arguments.decontaminate,
        field=arguments.decontaminate_field,
        ngram=arguments.decontaminate_ngram,
        matches=arguments.decontaminate_matches,
    )


def deduplicate(source: DistinctSource, output_dir: Path, execution: Execution) -> None:
    """Writes the documents of `source` that stay, and prints what became of the others.

    Raises UserError for bad input or an output folder that holds something else.
    """
    with working(output_dir, {"command": "deduplicate", **source.job()}, source.files(), execution) as work:
        if work is None:
            return
        print(describe(source), flush=True)
        results, found = write_documents(work, source, "write")
        if not work.finishes():
            return
        content = finish_documents(output_dir, work.job, results, **found).content
        duplicates = content["duplicates"]
        removed = " and ".join(f"{count:,} {method}" for method, count in duplicates["removed"].items())
        print(
            f"{output_dir}: {content['documents']:,} documents of {content['read']['documents']:,};"
            f" removed {removed} duplicates in {duplicates['clusters']:,} clusters,"
            f" the largest of {duplicates['largest_cluster']:,}"
        )


def describe(source: DistinctSource) -> str:
    """What duplicates and which evaluation data will be looked for."""
    said = [source.duplicates.describe()]
    for step in source.steps:
        if isinstance(step, DecontaminateOptions):
            index = step.describe()
            said.append(
                f"decontamination: {index['ngrams']:,} {step.ngram}-grams of {index['texts']:,} evaluation texts"
                f" ({index['short_texts']:,} shorter ones cannot be found)"
            )
    return "; ".join(said)


def _source(arguments: argparse.Namespace, upstream: Source | None) -> DistinctSource:
    """Evaluation data goes first: a cluster's kept document is one that may be kept."""
    source = upstream or Source(tuple(arguments.input), ReadOptions.of(arguments, fields=True))
    if decontaminate := decontaminate_options(arguments):
        source = source.then(decontaminate)
    return DistinctSource(source.inputs, source.reading, source.steps, duplicate_options(arguments))


def hand_on(arguments: argparse.Namespace, upstream: Source | None) -> Source:
    """The source of the documents that stay, for the stage that follows."""
    source = _source(arguments, upstream)
    print(describe(source), flush=True)
    return source


def main(arguments: argparse.Namespace, upstream: Source | None = None) -> None:
    deduplicate(_source(arguments, upstream), arguments.output_dir, Execution.of(arguments))
