"""What a finished folder says of itself: its manifest, its side files, and a bounded look at its data.

`inspect` prints it and `report` draws it. Nothing here depends on which stage made the folder: a step's counts are
read by their shape (`StepCounts`), so that a new rule shows up without a line changed.
"""

import ast
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import REJECTED_NAME, ReadOptions, list_parts, read_texts
from data_prep.encoding import Encoder, TokenizerInfo
from data_prep.errors import UserError
from data_prep.manifest import Manifest, read_json, read_manifest
from data_prep.shards import KIND as SHARDS
from data_prep.shards import ShardSet, is_foreign
from data_prep.write_documents import KIND as DOCUMENTS
from data_prep.write_documents import SAMPLES_NAME

_DECODED_TOKENS = 1 << 18
_COUNTED_TOKENS = 1 << 26
_ENCODED_BYTES = 1 << 20
_FILES_LOOKED_AT = 8
_PIECES_SHOWN = 12
_REPLACEMENT = "\ufffd"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class StepCounts:
    """What one step did with the documents that reached it.

    documents: those that reached it.
    removed, changed: documents by reason. A document is removed once, for the first reason that holds; it may be
        changed in several ways.
    samples: {reason: documents shown}, each a dict of "place", "text", mostly "id", "value" and "threshold".
    details: whatever else the step says of itself.
    """

    name: str
    documents: int
    removed: dict[str, int]
    changed: dict[str, int]
    samples: dict[str, list[dict[str, Any]]]
    details: dict[str, Any]

    @property
    def kept_samples(self) -> list[dict[str, Any]]:
        """The samples of no reason to remove or change anything: of documents that stayed."""
        known = self.removed.keys() | self.changed.keys()
        return [sample for reason, samples in self.samples.items() if reason not in known for sample in samples]

    @property
    def left(self) -> int:
        return self.documents - sum(self.removed.values())


@dataclass(frozen=True)
class SourceCounts:
    """Documents and tokens of one input."""

    file: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Findings:
    """One folder.

    manifest: None for shards of another program.
    documents_read, bytes_read: what its stage could read; None where the manifest does not say.
    rejected, rejected_reasons: input documents that could not be read, and by category; rejected_examples: the first
        records of them.
    lengths: {"read" or "left": {bit length of the size in bytes: documents}}.
    documents, text_bytes, tokens: what the folder holds; None where that has no meaning for its kind.
    sources: the inputs with most tokens.
    """

    folder: Path
    kind: str
    manifest: Manifest | None
    documents_read: int | None
    bytes_read: int | None
    rejected: int
    rejected_reasons: dict[str, int]
    rejected_examples: list[dict[str, Any]]
    steps: list[StepCounts]
    lengths: dict[str, dict[int, int]]
    documents: int | None
    text_bytes: int | None
    tokens: int | None
    sources: list[SourceCounts]

    @property
    def command(self) -> str:
        return str(self.manifest.job.get("command", "another program")) if self.manifest else "another program"

    @property
    def content(self) -> dict[str, Any]:
        return self.manifest.content if self.manifest else {}


def look_at(folder: Path, *, rejected_shown: int = 20) -> Findings:
    """Reads what `folder` says of itself.

    Raises UserError when it holds nothing that data_prep has finished, or when its manifest or a side file is damaged.
    """
    if is_foreign(folder):
        shards = ShardSet.open(folder)
        return Findings(
            folder, SHARDS, None, None, None, 0, {}, [], [], {}, sum(shards.documents), None, sum(shards.tokens), []
        )
    manifest = read_manifest(folder)
    content = manifest.content
    try:
        read = content.get("read", {})
        documents_read = _integer(read.get("documents"))
        reasons, examples = _rejections(folder, manifest, rejected_shown)
        return Findings(
            folder=folder,
            kind=manifest.kind,
            manifest=manifest,
            documents_read=documents_read,
            bytes_read=_integer(read.get("bytes")),
            rejected=sum(reasons.values()),
            rejected_reasons=reasons,
            rejected_examples=examples,
            steps=_steps(content.get("steps", {}), documents_read or 0, _samples(folder, manifest)),
            lengths={
                side: {int(bits): int(count) for bits, count in counts.items()}
                for side, counts in content.get("lengths", {}).items()
            },
            documents=_integer(content.get("documents")),
            text_bytes=_integer(content.get("text_bytes")),
            tokens=_integer(content.get("tokens")),
            sources=_sources(content.get("sources", {})),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its manifest or a file beside it is damaged ({error!r}): run `python -m data_prep verify"
            f" {folder}`"
        ) from None


def _sources(sources: dict[str, dict[str, int]] | list[dict[str, Any]]) -> list[SourceCounts]:
    """Most tokens first."""
    named = sources.items() if isinstance(sources, dict) else ((source["file"], source) for source in sources)
    found = [SourceCounts(str(file), int(counts["documents"]), int(counts["tokens"])) for file, counts in named]
    return sorted(found, key=lambda source: (-source.tokens, -source.documents, source.file))


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _steps(
    steps: dict[str, dict[str, Any]], documents: int, samples: dict[str, dict[str, list[dict[str, Any]]]]
) -> list[StepCounts]:
    found = []
    for name, summary in steps.items():
        step = StepCounts(
            name=name,
            documents=documents,
            removed=_flat(summary.get("removed", {})),
            changed=_flat(summary.get("changed", {})),
            samples=samples.get(name, {}),
            details={key: value for key, value in summary.items() if key not in ("removed", "changed", "samples")},
        )
        found.append(step)
        documents = step.left
    return found


def _flat(counts: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """{"a": 1, "b": {"c": 2}} as {"a": 1, "b: c": 2}."""
    flat: dict[str, int] = {}
    for key, value in counts.items():
        flat |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {prefix + key: int(value)}
    return flat


def _samples(folder: Path, manifest: Manifest) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    if SAMPLES_NAME in manifest.files:
        found = read_json(folder / SAMPLES_NAME)
    return found


def _rejections(folder: Path, manifest: Manifest, shown: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Counts by category (of the records, where the manifest has none), and the first records."""
    reasons = _flat(manifest.content.get("rejected_documents", {}))
    examples: list[dict[str, Any]] = []
    if REJECTED_NAME not in manifest.files:
        return reasons, examples
    counts: Counter[str] = Counter()
    with open(folder / REJECTED_NAME, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = json.loads(line)
            counts[str(record.get("category", record.get("reason", "unknown")))] += 1
            if len(examples) < shown:
                examples.append(record)
    return reasons or dict(counts.most_common()), examples


@dataclass(frozen=True)
class FunnelRow:
    """One line of the funnel: `documents` were left after it, `removed` of them by it.

    folder: whose folder's stage this is. unit: "documents", or "tokens" of the last line.
    """

    folder: str
    label: str
    documents: int
    removed: int
    reasons: dict[str, int]
    unit: str = "documents"


def funnel(found: Sequence[Findings]) -> list[FunnelRow]:
    """The way of the documents through these folders' stages, in the order of the folders.

    A mixture or a tokenizer is no stop on that way, and is left out.
    """
    rows: list[FunnelRow] = []
    for one in found:
        if one.kind not in (DOCUMENTS, SHARDS) or one.documents is None:
            continue
        name = one.folder.name or str(one.folder)
        last = rows[-1].documents if rows else None
        if one.documents_read is not None:
            if one.documents_read + one.rejected != last:
                rows.append(FunnelRow(name, "in the input", one.documents_read + one.rejected, 0, {}))
            if one.rejected:
                rows.append(
                    FunnelRow(name, "readable, with text", one.documents_read, one.rejected, one.rejected_reasons)
                )
        for step in one.steps:
            rows.append(FunnelRow(name, step.name, step.left, sum(step.removed.values()), step.removed))
        if not rows or rows[-1].documents != one.documents or one.kind == SHARDS:
            before = rows[-1].documents if rows and rows[-1].folder == name else one.documents
            label = "encoded" if one.kind == SHARDS else "written"
            rows.append(FunnelRow(name, label, one.documents, max(0, before - one.documents), {}))
    return rows


def gaps(found: Sequence[Findings]) -> list[str]:
    """Where a folder did not read what the folder before it left: one line each."""
    lines = []
    chain = [one for one in found if one.kind in (DOCUMENTS, SHARDS)]
    for before, after in itertools.pairwise(chain):
        if after.documents_read is None or before.documents is None:
            continue
        read = after.documents_read + after.rejected
        if read != before.documents:
            lines.append(f"{before.folder} left {before.documents:,} documents, {after.folder} was given {read:,}")
    return lines


def token_lengths(shards: ShardSet) -> dict[int, int]:
    """Documents by the bit length of their number of tokens; one shard's index in memory at a time."""
    counts: Counter[int] = Counter()
    for index in range(len(shards.names)):
        lengths = np.diff(shards.shard(index).document_offsets)
        bits = np.frexp(lengths.astype(np.float64))[1]
        for value, count in zip(*np.unique(bits, return_counts=True), strict=True):
            counts[int(value)] += int(count)
    return dict(sorted(counts.items()))


def token_counts(shards: ShardSet, max_tokens: int = _COUNTED_TOKENS) -> NDArray[np.int64]:
    """How often each id occurs [largest id + 1] in the set or, of a larger one, in an equal stretch of each shard."""
    counts = np.zeros(0, dtype=np.int64)
    share = min(1.0, max_tokens / max(1, sum(shards.tokens)))
    for index in range(len(shards.names)):
        tokens = shards.shard(index).tokens
        found = np.bincount(tokens[: int(np.ceil(len(tokens) * share))], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def kept_texts(one: Findings, wanted: int, encoder: Encoder | None = None) -> Iterator[tuple[str, str]]:
    """Some documents that the folder holds: (where it lies and how long it is, text), spread evenly over its files.

    Of shards, `encoder` decodes them; without one there are none.
    """
    if one.kind == DOCUMENTS and one.manifest is not None:
        files = _spread(
            [name for name in one.manifest.files if name.endswith(".jsonl") and name != REJECTED_NAME], wanted
        )
        for number, name in enumerate(files):
            share = wanted // len(files) + (number < wanted % len(files))
            for index, text in enumerate(itertools.islice(_texts(one, name), share)):
                yield f"document {index} of {name}, {len(text):,} characters", text
    if one.kind == SHARDS and encoder is not None:
        shards = ShardSet.open(one.folder)
        for shard, document, ids in _documents(shards, wanted):
            text = encoder.decode(ids)
            yield f"document {document} of shard {shards.names[shard]}, {len(ids):,} tokens", text


def text_field(job: dict[str, Any]) -> str:
    """The key of the text in what a job has written: that of what it read (`ReadOptions`, as an object or its repr)."""
    reading = job.get("reading", job)
    if isinstance(reading, str):
        found = re.search(r"text_field=('[^']*'|\"[^\"]*\")", reading)
        return str(ast.literal_eval(found[1])) if found else "text"
    return str(reading.get("text_field", "text"))


def _spread(items: Sequence[Any], wanted: int) -> list[Any]:
    """At most `wanted` of the items, evenly spaced, the first and the last among them."""
    if not items:
        return []
    chosen = np.unique(np.linspace(0, len(items) - 1, min(wanted, len(items))).astype(int))
    return [items[index] for index in chosen]


def _texts(one: Findings, name: str) -> Iterator[str]:
    assert one.manifest is not None
    options = ReadOptions(text_field=text_field(one.manifest.job), part_bytes=1 << 40)
    for part in list_parts([str(one.folder / name)], options):
        yield from read_texts(part, options)


def _documents(shards: ShardSet, wanted: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """(shard, document, ids without the id that ends it), spread evenly over the set."""
    bounds = np.cumsum([0, *shards.documents])
    total = int(bounds[-1])
    for number in np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64)):
        shard = int(np.searchsorted(bounds, number, side="right")) - 1
        document = int(number - bounds[shard])
        ids = shards.shard(shard).document(document)
        ends = shards.end_of_document is not None and len(ids) and ids[-1] == shards.end_of_document
        yield shard, document, ids[:-1] if ends else ids


@dataclass(frozen=True)
class Fertility:
    """How a tokenizer fits a text.

    source: what was measured. documents, tokens, words, text_bytes: of the texts encoded or decoded for it; ends of
        documents do not count. A word is a stretch without white space.
    counted: tokens among which `unknown` and `used` were counted. unknown: None where the tokenizer has no unknown
        token. used: ids of the vocabulary that occur.
    longest, frequent: (piece as text, occurrences).
    """

    source: str
    documents: int
    tokens: int
    words: int
    text_bytes: int
    counted: int
    unknown: int | None
    used: int
    vocab_size: int
    longest: list[tuple[str, int]]
    frequent: list[tuple[str, int]]


def fertility_of_shards(folder: Path, info: TokenizerInfo, encoder: Encoder) -> Fertility:
    """Measured on evenly spaced documents of the shards (256 Ki tokens, decoded) and on the counts of 64 Mi tokens.

    Raises UserError when another tokenizer made the shards.
    """
    shards = ShardSet.open(folder)
    check_tokenizer(shards, info)
    documents = tokens = words = text_bytes = 0
    wanted = max(1, int(_DECODED_TOKENS / max(1, sum(shards.tokens) / max(1, sum(shards.documents)))))
    for _, _, ids in _documents(shards, wanted):
        text = encoder.decode(ids[:_DECODED_TOKENS])
        documents, tokens, words = documents + 1, tokens + len(ids[:_DECODED_TOKENS]), words + len(text.split())
        text_bytes += len(text.encode("utf-8", "replace"))
        if tokens >= _DECODED_TOKENS:
            break
    counts = token_counts(shards)
    if len(counts) > info.special.end_of_document:
        counts[info.special.end_of_document] = 0
    return _fertility(f"{folder}, decoded", (documents, tokens, words, text_bytes), counts, info, encoder)


def fertility_of_documents(one: Findings, info: TokenizerInfo, encoder: Encoder) -> Fertility:
    """Measured on about a megabyte of text from up to eight of the folder's files, encoded."""
    assert one.manifest is not None
    names = _spread(
        [name for name in one.manifest.files if name.endswith(".jsonl") and name != REJECTED_NAME], _FILES_LOOKED_AT
    )
    documents = tokens = words = text_bytes = 0
    counts = np.zeros(info.vocab_size, dtype=np.int64)
    for name in names:
        taken = 0
        for text in _texts(one, name):
            text = text[:_ENCODED_BYTES]
            ids = encoder.encode_batch([text])[0]
            counts += np.bincount(ids, minlength=info.vocab_size)
            size = len(text.encode())
            documents, tokens, words = documents + 1, tokens + len(ids), words + len(text.split())
            text_bytes, taken = text_bytes + size, taken + size
            if taken >= _ENCODED_BYTES // len(names):
                break
    return _fertility(f"{one.folder}, encoded", (documents, tokens, words, text_bytes), counts, info, encoder)


def _fertility(
    source: str, totals: tuple[int, int, int, int], counts: NDArray[np.int64], info: TokenizerInfo, encoder: Encoder
) -> Fertility:
    unknown = info.special.unknown
    used = np.flatnonzero(counts)
    pieces = [(encoder.decode([index]), int(counts[index])) for index in used.tolist()]
    whole = [(piece, count) for piece, count in pieces if piece.strip() and _REPLACEMENT not in piece]
    return Fertility(
        source,
        *totals,
        counted=int(counts.sum()),
        unknown=None if unknown is None else int(counts[unknown]) if unknown < len(counts) else 0,
        used=len(used),
        vocab_size=info.vocab_size,
        longest=sorted(whole, key=lambda item: (-len(item[0]), item[0]))[:_PIECES_SHOWN],
        frequent=sorted(whole, key=lambda item: (-item[1], item[0]))[:_PIECES_SHOWN],
    )


def check_tokenizer(shards: ShardSet, info: TokenizerInfo) -> None:
    """Raises UserError when the shards were made with another tokenizer."""
    made_by = shards.tokenizer_fingerprint
    if made_by not in (None, info.fingerprint):
        assert made_by is not None
        raise UserError(
            f"{info.folder} has fingerprint {info.fingerprint[:12]}, the shards in {shards.folder} were made with"
            f" {made_by[:12]}; name the tokenizer that made them"
        )


def visible(text: str) -> str:
    """`text` with what would command a terminal or a browser (escapes, NUL, changes of direction) made visible."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def bin_bounds(bits: int) -> tuple[int, int]:
    """The smallest and largest number of this bit length."""
    return (0, 0) if bits == 0 else (1 << (bits - 1), (1 << bits) - 1)


def human_bytes(size: float) -> str:
    """1234567 as "1.23 MB": three digits, powers of 1,000."""
    if size < 1000:
        return f"{size:,.0f} bytes"
    units = ("kB", "MB", "GB", "TB")
    exponent = next((n for n in range(1, len(units)) if round(size / 1000**n) < 1000), len(units))
    value = size / 1000**exponent
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {units[exponent - 1]}"
