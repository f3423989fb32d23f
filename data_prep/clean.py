"""Documents cleaned: text made regular, documents and lines dropped by published rules, everything counted."""

import argparse
import time
from pathlib import Path
from typing import Any

from data_prep.cleaning import DEFAULT_RULES, DEFAULT_SETTINGS, RULES, CleanOptions
from data_prep.documents import ReadOptions, add_input_arguments
from data_prep.language import DEFAULT_MIN_SCORE
from data_prep.parts import Execution, add_work_arguments, working
from data_prep.stream import Source, most_first

SUMMARY = """\
Clean documents: Unicode NFC, no control characters, and the rules of Gopher, C4 and FineWeb; docs/cleaning.md defines
them. Kept documents keep their fields; removals are counted by reason, and samples of them kept (samples.json)."""
EXAMPLES = """\
  python -m data_prep clean --input 'raw/*.jsonl.zst' --output_dir data/clean
  python -m data_prep clean --input crawl.warc.gz --languages en de --mask_pii --output_dir data/clean
  python -m data_prep clean --input 'raw/*.parquet' --rules length gopher_repetition --set length.min_words=20 \\
      gopher_repetition.max_top_2_gram=none --output_dir data/clean
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the cleaned documents")
    add_clean_arguments(parser)
    add_work_arguments(parser)


def add_clean_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `clean_options`."""
    parser.add_argument(
        "--rules",
        nargs="*",
        metavar="RULE",
        help=f"rules to apply, in this order, of {' '.join(RULES)}; none given: normalize only"
        f" (default, FineWeb's: {' '.join(DEFAULT_RULES)}, with {' '.join(DEFAULT_SETTINGS)})",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="RULE.PARAMETER=VALUE",
        help="thresholds other than the published ones, such as gopher_quality.min_words=20; none switches one off",
    )
    parser.add_argument(
        "--languages", nargs="+", default=[], metavar="CODE", help="keep documents in these languages only (en de ...)"
    )
    parser.add_argument(
        "--min_language_score",
        type=float,
        default=DEFAULT_MIN_SCORE,
        metavar="P",
        help="drop documents whose language is less probable (default: %(default)s)",
    )
    parser.add_argument("--fix_mojibake", action="store_true", help="mend text decoded with the wrong encoding (ftfy)")
    parser.add_argument("--mask_pii", action="store_true", help="replace e-mail addresses and public IP addresses")


def clean_options(arguments: argparse.Namespace) -> CleanOptions:
    """From the flags of `add_clean_arguments`; raises UserError for what they may not say."""
    return CleanOptions.of(
        arguments.rules,
        arguments.set,
        languages=arguments.languages,
        min_language_score=arguments.min_language_score,
        fix_mojibake=arguments.fix_mojibake,
        mask_pii=arguments.mask_pii,
        id_field=arguments.id_field,
    )


def clean(source: Source, options: CleanOptions, output_dir: Path, execution: Execution) -> None:
    """Writes the documents of `source`, cleaned, to `output_dir`, and prints what became of them.

    Raises UserError for bad input, missing packages, or an output folder that holds something else.
    """
    from data_prep.write_documents import finish_documents, write_documents

    options.make(0)  # what is missing is said before any work begins
    job = {"command": "clean", **source.job(), "clean": options.job()}
    source = source.then(options)
    with working(output_dir, job, source.files(), execution) as work:
        if work is None:
            return
        started = time.monotonic()
        results, found = write_documents(work, source, "clean")
        if work.finishes():
            content = finish_documents(output_dir, work.job, results, **found).content
            print(describe(output_dir, content, time.monotonic() - started))


def describe(output_dir: Path, content: dict[str, Any], seconds: float) -> str:
    """The table printed at the end: documents and bytes in and out, removals by reason, speed."""
    step = content["steps"][CleanOptions.name]
    documents, size = step["documents"], step["bytes"]
    rows = [("read", documents["in"], f"{size['in'] / 1e6:,.1f} MB")]
    rows += [(f"- {reason}", count, "") for reason, count in most_first(step["removed"])]
    rows.append(("kept", documents["out"], f"{size['out'] / 1e6:,.1f} MB"))
    rows += [(f"changed by {change}", count, "") for change, count in step["changed"].items() if count]
    rejected = sum(content.get("rejected_documents", {}).values())
    if rejected:
        rows.append(("could not be read (rejected.jsonl) or blank", rejected, ""))
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{name:<{width}}  {count:>12,}  {count / max(1, documents['in']):>8.2%}  {note}" for name, count, note in rows
    ]
    speed = size["in"] / 1e6 / max(seconds, 1e-9)
    lines.append(f"{output_dir}: {documents['out']:,} documents in {seconds:.1f} s, {speed:,.1f} MB/s")
    return "\n".join(line.rstrip() for line in lines)


def hand_on(arguments: argparse.Namespace, upstream: Source | None) -> Source:
    """The source of the cleaned documents, which are written nowhere: they stream into the stage that follows."""
    source = upstream or Source(tuple(arguments.input), ReadOptions.of(arguments, fields=True))
    options = clean_options(arguments)
    options.make(0)
    return source.then(options)


def main(arguments: argparse.Namespace, upstream: Source | None = None) -> None:
    source = upstream or Source(tuple(arguments.input), ReadOptions.of(arguments, fields=True))
    execution = Execution.of(arguments)
    clean(source, clean_options(arguments), arguments.output_dir, execution)
