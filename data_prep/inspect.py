"""Shows what folders of data hold: counts, the documents' way through the steps, lengths, and documents decoded."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import mix
from data_prep.documents import REJECTED_NAME
from data_prep.encoding import Encoder, TokenizerInfo, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.findings import (
    Fertility,
    Findings,
    SourceCounts,
    bin_bounds,
    check_tokenizer,
    fertility_of_documents,
    fertility_of_shards,
    funnel,
    gaps,
    human_bytes,
    kept_texts,
    look_at,
    token_lengths,
    visible,
)
from data_prep.manifest import read_json
from data_prep.parts import positive_integer
from data_prep.shards import KIND as SHARDS
from data_prep.shards import ShardSet, survey, unigram_entropy
from data_prep.write_documents import KIND as DOCUMENTS

SUMMARY = "Show what folders of documents, tokenizers, shards or mixtures hold; as text or as one HTML page."
EXAMPLES = """\
  python -m data_prep inspect data/shards --tokenizer data/tokenizer --documents 3
  python -m data_prep inspect data/clean --removed
  python -m data_prep inspect data/clean data/dedup data/shards --tokenizer data/tokenizer --report report.html
  python -m data_prep inspect data/mixture --tokens 10e9
"""
_BAR_CHARACTERS = 40
_REJECTED_SHOWN = 5
_SOURCES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="D", help="folders that data_prep has made, in order")
    parser.add_argument(
        "--documents", type=positive_integer, default=2, help="documents to show (default: %(default)s)"
    )
    parser.add_argument(
        "--characters", type=positive_integer, default=300, help="characters of each (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="D", help="tokenizer folder, to show shards as text and to measure it"
    )
    parser.add_argument("--removed", action="store_true", help="show documents that each rule has removed")
    parser.add_argument(
        "--tokens", type=mix.positive_number, metavar="N", help="tokens of a training, for a mixture's epochs"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write all of it as one HTML page instead")


def histogram(counts: Mapping[int, int], unit: str) -> str:
    """A text histogram, one bar a line; counts: of each bit length of a number of `unit`."""
    most = max(counts.values(), default=1)
    lines = []
    for bits in range(min(counts, default=0), max(counts, default=-1) + 1):
        count = counts.get(bits, 0)
        first, last = bin_bounds(bits)
        lines.append(f"  {first:>13,} - {last:>13,} {unit} {count:>11,} {'█' * round(_BAR_CHARACTERS * count / most)}")
    return "\n".join(line.rstrip() for line in lines)


def _excerpt(text: str, characters: int) -> str:
    cut = visible(text[:characters]) + ("..." if len(text) > characters else "")
    return "\n".join("  | " + line for line in cut.splitlines())


def shown(value: object) -> str:
    """A value as a table shows it: thousands separated, six significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _table(content: Mapping[str, object]) -> str:
    return "\n".join(
        f"  {key.replace('_', ' '):<22} {shown(value)}"
        for key, value in content.items()
        if isinstance(value, int | float | str)
    )


def _nested(content: Mapping[str, Any], indent: str = "  ") -> list[str]:
    lines = []
    for key, value in content.items():
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_nested(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: {', '.join(map(shown, value[:8]))}{', ...' if len(value) > 8 else ''}")
        elif value is not None and value != "":
            lines.append(f"{indent}{name}: {shown(value)}")
    return lines


def _funnel_text(found: Sequence[Findings]) -> str:
    rows = funnel(found)
    if len(rows) < 2:
        return ""
    lines = ["\ndocuments through the steps:"]
    first, several = max(1, rows[0].documents), len({row.folder for row in rows}) > 1
    labels = [f"{row.folder}: {row.label}" if several else row.label for row in rows]
    width = max(len(label) for label in [*labels, *(f"    {reason}" for row in rows for reason in row.reasons)])
    for row, label in zip(rows, labels, strict=True):
        removed = f"  -{row.removed:,}" if row.removed else ""
        lines.append(f"  {label:<{width}} {row.documents:>13,} {row.documents / first:>8.2%}{removed}")
        for reason, count in sorted(row.reasons.items(), key=lambda item: (-item[1], item[0])):
            if count:
                share = count / max(1, row.documents + row.removed)
                lines.append(f"      {reason:<{width - 4}} {-count:>13,} {share:>8.2%}")
    lines += [f"  note: {gap}" for gap in gaps(found)]
    return "\n".join(lines)


def _changed_text(one: Findings) -> str:
    lines = [
        f"  {step.name}: {what:<30} {count:>13,}" for step in one.steps for what, count in step.changed.items() if count
    ]
    return "\ndocuments changed:\n" + "\n".join(lines) if lines else ""


def _rejected_text(one: Findings) -> str:
    if not one.rejected:
        return ""
    lines = [f"\nrejected, {one.rejected:,} documents:"]
    lines += [f"  {category:<22} {count:>13,}" for category, count in one.rejected_reasons.items()]
    for record in one.rejected_examples[:_REJECTED_SHOWN]:
        lines.append(visible(f"  {record.get('file')}:{record.get('line')}: {record.get('reason')}"))
    if one.rejected > _REJECTED_SHOWN and one.rejected_examples:
        lines.append(f"  more in {one.folder / REJECTED_NAME}")
    return "\n".join(lines)


def _removed_text(one: Findings, wanted: int, characters: int) -> str:
    lines = []
    for step in one.steps:
        for reason in (reason for reason in step.samples if reason in step.removed or reason in step.changed):
            for sample in step.samples[reason][:wanted]:
                facts = filter(None, [str(sample.get("place", "")), measured_of(sample), others_of(sample)])
                lines.append(visible(f"\n{step.name}, {reason}: {', '.join(facts)}"))
                lines += [
                    ("" if name == "text" else f"  {name}:\n") + _excerpt(text, characters)
                    for name, text in texts_of(sample)
                ]
    return "\n".join(lines) if lines else f"\n{one.folder}: no samples of removed documents are kept here"


def measured_of(sample: Mapping[str, Any]) -> str:
    """What was measured of a sample against its threshold; empty where nothing was."""
    if "value" not in sample:
        return ""
    against = f", threshold {shown(sample['threshold'])}" if sample.get("threshold") is not None else ""
    return f"measured {shown(sample['value'])}{against}"


def others_of(sample: Mapping[str, Any]) -> str:
    """The short fields of a sample beside its place, its texts and what was measured."""
    known = {"key", "place", "value", "threshold", *(name for name, _ in texts_of(sample))}
    return ", ".join(
        f"{key.replace('_', ' ')} {shown(value)}"
        for key, value in sample.items()
        if key not in known and value is not None
    )


def texts_of(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields of a sample that are read as text: (name, text), its "text" first."""
    named = [
        (key, value)
        for key, value in sample.items()
        if isinstance(value, str) and (key == "text" or key.endswith("_text"))
    ]
    return sorted(named, key=lambda item: item[0] != "text")


def _sources_text(one: Findings) -> str:
    if not one.sources:
        return ""
    total = max(1, sum(source.tokens for source in one.sources))
    lines = [f"\ntokens a source:\n  {'documents':>13} {'tokens':>17} {'share':>7}  file"]
    for source in sources_shown(one.sources, _SOURCES_SHOWN):
        lines.append(f"  {source.documents:>13,} {source.tokens:>17,} {source.tokens / total:>7.2%}  {source.file}")
    return "\n".join(lines)


def sources_shown(sources: Sequence[SourceCounts], wanted: int) -> list[SourceCounts]:
    """The first of the sources, and one line for all others."""
    rest = sources[wanted:]
    others = (f"{len(rest):,} more files", sum(one.documents for one in rest), sum(one.tokens for one in rest))
    return [*sources[:wanted], *([SourceCounts(*others)] if rest else [])]


def _pieces(pieces: Sequence[tuple[str, int]]) -> str:
    return "  ".join(f"{piece!r}" for piece, _ in pieces)


def fertility_rows(fertility: Fertility) -> list[tuple[str, str]]:
    """The figures of a tokenizer's fit, each with its name and unit."""
    one_of = fertility
    unknown = "none: it has no unknown token"
    if one_of.unknown is not None:
        unknown = f"{one_of.unknown / max(1, one_of.counted):.4%} ({one_of.unknown:,} of {one_of.counted:,})"
    return [
        ("tokens a word", f"{one_of.tokens / max(1, one_of.words):.3f}"),
        ("bytes a token", f"{one_of.text_bytes / max(1, one_of.tokens):.3f}"),
        ("unknown tokens", unknown),
        ("vocabulary used", f"{one_of.used / one_of.vocab_size:.1%} ({one_of.used:,} of {one_of.vocab_size:,})"),
        (
            "measured on",
            f"{one_of.documents:,} documents, {one_of.tokens:,} tokens, {human_bytes(one_of.text_bytes)} of text"
            f" ({one_of.source})",
        ),
    ]


def _fertility_text(fertility: Fertility) -> str:
    lines = ["\nthe tokenizer on this text:", *(f"  {name:<22} {value}" for name, value in fertility_rows(fertility))]
    lines.append(f"  {'longest pieces':<22} {_pieces(fertility.longest)}")
    lines.append(f"  {'most frequent pieces':<22} {_pieces(fertility.frequent)}")
    return "\n".join(lines)


def foreign_table(shards: ShardSet) -> dict[str, object]:
    """What the shards of another program say of themselves."""
    found = survey(shards)
    return {
        "documents": sum(shards.documents),
        "tokens": sum(shards.tokens),
        "dtype": shards.shard(0).dtype.name,
        "largest id": found.largest,
        "documents end with": f"id {found.last} ({found.last_share:.1%} of {found.documents:,} looked at)",
    }


def choose_tokenizer(folder: Path | None, found: Sequence[Findings]) -> tuple[TokenizerInfo, Encoder] | None:
    """The tokenizer that the user named, or the one among the folders; None where there is none."""
    named = folder or next((one.folder for one in found if one.kind == "tokenizer"), None)
    if named is None:
        return None
    return load_tokenizer_info(named), Encoder(named)


def _shards_text(one: Findings, tokenizer: tuple[TokenizerInfo, Encoder] | None) -> str:
    shards = ShardSet.open(one.folder)
    counts = foreign_table(shards) if one.manifest is None else one.content
    made_by = (shards.tokenizer_fingerprint or "unknown")[:12]
    lines = [
        _table({**counts, "shards": len(shards.names), "tokenizer": made_by}),
        f"  {'unigram entropy':<22} {unigram_entropy(shards):.3f} nats a token",
    ]
    if isinstance(one.content.get("encoder"), dict):
        lines += ["\nencoder, and how it was checked:", *_nested(one.content["encoder"])]
    lines += ["\ndocuments by length:", histogram(token_lengths(shards), "tokens")]
    if tokenizer is not None:
        lines.append(_fertility_text(fertility_of_shards(one.folder, *tokenizer)))
    return "\n".join(lines)


def _documents_text(one: Findings, tokenizer: tuple[TokenizerInfo, Encoder] | None) -> str:
    lines = [_table(one.content)]
    if one.lengths.get("left"):
        lines += ["\ndocuments by length:", histogram(one.lengths["left"], "bytes")]
    if tokenizer is not None:
        lines.append(_fertility_text(fertility_of_documents(one, *tokenizer)))
    return "\n".join(lines)


def _tokenizer_text(one: Findings) -> str:
    vocabulary = read_json(one.folder / "tokenizer.json")["model"]["vocab"]
    pieces = list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    longest = "  ".join(map(repr, sorted(pieces, key=len)[-8:]))
    return f"{_table(one.content)}\n  longest pieces         {longest}"


def _print_folder(
    one: Findings, tokenizer: tuple[TokenizerInfo, Encoder] | None, arguments: argparse.Namespace
) -> None:
    made_by = "shards of another program (no manifest.json)"
    print(f"{one.folder}: {f'{one.kind}, made by {one.command}' if one.manifest else made_by}")
    if one.kind == SHARDS:
        print(_shards_text(one, tokenizer))
    elif one.kind == DOCUMENTS:
        print(_documents_text(one, tokenizer))
    elif one.kind == mix.KIND:
        print(mix.describe(mix.read_mixture(one.folder), arguments.tokens))
    elif one.kind == "tokenizer":
        print(_tokenizer_text(one))
    else:
        print(_table(one.content))
    texts = [_funnel_text([one]), _changed_text(one), _rejected_text(one), _sources_text(one)]
    if arguments.removed:
        texts.append(_removed_text(one, arguments.documents, arguments.characters))
    print("".join(f"{text}\n" for text in texts if text), end="")
    encoder = tokenizer[1] if tokenizer else None
    for label, text in kept_texts(one, arguments.documents, encoder):
        print(f"\n{label}:\n{_excerpt(text, arguments.characters)}")


def main(arguments: argparse.Namespace) -> None:
    found = [look_at(folder) for folder in arguments.folders]
    tokenizer = choose_tokenizer(arguments.tokenizer, found)
    if tokenizer is not None:
        for one in found:
            if one.kind == SHARDS:
                check_tokenizer(ShardSet.open(one.folder), tokenizer[0])
    if arguments.report is not None:
        from data_prep import report

        if arguments.report.is_dir():
            raise UserError(f"--report {arguments.report} is a folder, expected the name of a file")
        report.write(arguments.report, found, tokenizer, arguments.documents, arguments.tokens)
        print(f"{arguments.report}: open it in any browser")
        return
    for number, one in enumerate(found):
        if number:
            print()
        _print_folder(one, tokenizer, arguments)
    if len(found) > 1 and (text := _funnel_text(found)):
        print(text)
