"""Documents to token shards: one shard a part of the input, each made by one worker process."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.documents import DEFAULT_PART_MEGABYTES, Part, ReadOptions, add_input_arguments, read_texts
from data_prep.errors import UserError
from data_prep.manifest import FileRecord, Manifest, read_json
from data_prep.parts import Execution, Report, Work, add_work_arguments, working
from data_prep.stream import DocumentStream, Source, describe_steps, merge
from data_prep.write_documents import write_side_files

if TYPE_CHECKING:
    import numpy as np

    from data_prep.encoder_check import Checked, Proof
    from data_prep.encoding import TokenizerInfo

SUMMARY = "Encode documents with a tokenizer into memory-mapped token shards (Megatron .bin/.idx)."
EXAMPLES = """\
  python -m data_prep tokenize --input 'corpus/*.jsonl.zst' --tokenizer data/tokenizer --output_dir data/shards
  python -m data_prep tokenize --input wiki.parquet --text_field body --tokenizer data/gpt2 --output_dir data/wiki \\
      --shuffle_seed 1
"""
WORKER_IMPORTS = (
    "data_prep.readers",
    "data_prep.encoder_check",
    "data_prep.fast_encoders",
    "data_prep.sentences",
    "data_prep.shards",
    "gigatoken",
    "awkward",  # which gigatoken imports at its first batch
    "tokenizers",
)
REFERENCE = "reference"
_CHECKED_BYTES = 1 << 20  # of the corpus's beginning, before the job; the reference takes 0.2 s for it
_SOURCES_SHOWN = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="D", help="tokenizer folder (tokenizer.json)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the shards")
    parser.add_argument(
        "--encoder",
        choices=("auto", REFERENCE),
        default="auto",
        help="auto: a faster one where its ids are seen to be the reference's (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "uint16", "int32"),
        default="auto",
        help="of the ids; auto: uint16 for vocabularies below 65,500 (default: %(default)s)",
    )
    parser.add_argument(
        "--sentences",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep sentence starts beside the tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--shuffle_seed", type=int, metavar="N", help="shuffle the documents of all inputs (default: their own order)"
    )
    add_work_arguments(parser)


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the shards beside the documents and the tokenizer; the job's key has every field.

    encoder: "auto" or "reference". dtype: "auto", "uint16" or "int32". shuffle_seed: None keeps the inputs' order.
    """

    encoder: str = "auto"
    dtype: str = "auto"
    sentences: bool = True
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class PartOptions:
    """How one part is encoded; its repr identifies it.

    encoder: name of a fast encoder or "reference". one_in: how many documents there are for one that is checked.
    differs: a file that is made when an encoder was seen to differ, so that other parts need not finish.
    """

    tokenizer: str
    fingerprint: str
    encoder: str
    dtype: str
    end_of_document: int
    sentences: bool
    differs: str
    one_in: int


def encode_part(
    source: Source, part: Part, number: int, prefix: str, options: PartOptions, report: Report
) -> dict[str, Any]:
    """Encodes the documents of one part into the shard `prefix`; returns its counts and file records.

    Every document ends with the id of the end of a document. Memory is that of a few MB of text and its ids, 12 bytes
    a document and 4 a sentence. Returns {"difference": ...} and leaves no shard when the encoder is seen to differ
    from the reference, here or in another part.
    """
    import numpy as np

    from data_prep.encoder_check import SampleCheck
    from data_prep.encoding import Encoder
    from data_prep.fast_encoders import load_encoder
    from data_prep.sentences import SentenceFinder, SentencesWriter, Text, with_ends
    from data_prep.shards import ShardWriter

    folder, dtype = Path(options.tokenizer), np.dtype(options.dtype)
    reference = load_encoder(Encoder.name, folder, options.fingerprint)
    assert isinstance(reference, Encoder)
    try:
        encoder = load_encoder(options.encoder, folder, options.fingerprint)
    except Exception as error:  # of any library, for any reason: the reference stays
        Path(options.differs).touch()
        return {"difference": f"{options.encoder} does not take it ({' '.join(str(error).split())[:200]})"}
    left_to_reference = -getattr(encoder, "reference_documents", 0)
    check = SampleCheck(reference, number, options.one_in)
    finder = SentenceFinder(folder, reference) if options.sentences else None
    sentences = SentencesWriter(Path(prefix))
    stream = DocumentStream(source, part, number, report)
    text_bytes = 0
    seconds = {"reading": 0.0, "encoding": 0.0, "checking": 0.0, "sentences": 0.0, "writing": 0.0}
    clock = _Clock(seconds)
    difference: str | None = None
    with ShardWriter(Path(prefix), dtype) as writer:
        for batch in stream:
            if options.encoder != REFERENCE and os.path.exists(options.differs):
                difference = ""
                break
            raw = batch.utf8()
            clock("reading")
            encoded = encoder.encode_flat(batch.texts, raw)
            clock("encoding")
            if options.encoder != REFERENCE and (found := check(batch.texts, raw, encoded)):
                place = batch.place(found[0])
                difference = f"{encoder.name} {encoder.version} gives another id at token {found[1]} of {place}"
                Path(options.differs).touch()
                break
            clock("checking")
            text = Text.of(raw)
            text_bytes += int(text.offsets[-1])
            if finder:
                sentences.append_batch(*finder(batch.texts, text, encoded))
            clock("sentences")
            writer.append_batch(with_ends(encoded, options.end_of_document, dtype), encoded.lengths + 1)
            clock("writing")
        clock("reading")
    if difference is not None or not writer.documents:
        for suffix in (".bin", ".idx"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        if difference is not None:
            return {"difference": difference}
    files = dict(writer.files) if writer.documents else {}
    if finder and writer.documents:
        files |= sentences.write()
    clock("writing")
    return {
        **stream.summary(),
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "sentences": sentences.sentences if finder and writer.documents else 0,
        "slow_sentence_documents": finder.slow_documents if finder else 0,
        "reference_documents": left_to_reference + getattr(encoder, "reference_documents", 0),
        "checked_documents": check.checked.documents,
        "checked_tokens": check.checked.tokens,
        "encoder": [encoder.name, encoder.version],
        "seconds": seconds,
        "files": {name: vars(record) for name, record in files.items()},
    }


class _Clock:
    """Adds the time since it was last called to a named sum."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now


def tokenize(
    inputs: Sequence[str],
    tokenizer: Path,
    output_dir: Path,
    *,
    options: TokenizeOptions | None = None,
    part_bytes: int = DEFAULT_PART_MEGABYTES * 1_000_000,
    workers: int = 1,
    overwrite: bool = False,
) -> None:
    """`tokenize_source` of files, read with the defaults."""
    source = Source(tuple(inputs), ReadOptions(part_bytes=part_bytes))
    execution = Execution(workers=workers, overwrite=overwrite)
    tokenize_source(source, tokenizer, output_dir, options or TokenizeOptions(), execution)


def tokenize_source(
    source: Source, tokenizer: Path, output_dir: Path, options: TokenizeOptions, execution: Execution
) -> None:
    """Makes the shard set of what `source` yields; see `add_arguments` for the options.

    Raises UserError for bad input, an unusable tokenizer, a dtype that does not hold its ids, or an output folder
    that holds something else.
    """
    from data_prep.encoding import load_tokenizer_info

    info = load_tokenizer_info(tokenizer)
    dtype = _dtype(options.dtype, info)
    inputs = source.files()
    job = {
        "command": "tokenize",
        **source.job(),
        "tokenizer_fingerprint": info.fingerprint,
        **asdict(options),
    }
    started = time.monotonic()
    with working(output_dir, job, inputs, execution) as work:
        if work is None:
            return
        shards = encode_source(work, source, info, dtype, options)
        if work.finishes():
            seconds = time.monotonic() - started
            print(_write_manifest(work, shards, info, dtype, options).describe(output_dir, seconds))


@dataclass(frozen=True)
class EncodedShards:
    """What a job has written before its manifest.

    results: of every part of the input. shards: of every shard (the parts, where they are not shuffled); those
    without documents have no files. encoder, content: for the manifest.
    """

    results: list[dict[str, Any]]
    shards: list[dict[str, Any]]
    parts: list[Part]
    encoder: dict[str, Any]
    content: dict[str, Any]


def encode_source(
    work: Work, source: Source, info: "TokenizerInfo", dtype: "np.dtype[Any]", options: TokenizeOptions
) -> EncodedShards:
    """Encodes every part, again with the reference where a fast encoder is seen to differ, and shuffles."""
    from data_prep.encoder_check import CHECKED_DOCUMENT_IN, Checked
    from data_prep.shuffle import shuffle

    ready = source.ready(work)
    source = ready.source
    parts = source.parts()
    shuffled = options.shuffle_seed is not None
    folder = work.scratch / "unshuffled" if shuffled else work.output_dir
    prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
    differs = work.scratch / "encoder-differs"

    def encode(encoder: str, description: str) -> list[dict[str, Any]]:
        part_options = PartOptions(
            tokenizer=str(info.folder),
            fingerprint=info.fingerprint,
            encoder=encoder,
            dtype=dtype.str,
            end_of_document=info.special.end_of_document,
            sentences=options.sentences,
            differs=str(differs),
            one_in=CHECKED_DOCUMENT_IN,
        )
        return work.run(
            encode_part,
            [(source, part, n, str(prefixes[n]), part_options) for n, part in enumerate(parts)],
            part_inputs=[[part.path] for part in parts],
            part_bytes=[part.bytes for part in parts],
            description=description,
        )

    name = _encoder_of(work, info.folder) if options.encoder == "auto" else REFERENCE
    left = None
    checked = Checked()
    if name == REFERENCE:
        results = encode(REFERENCE, "tokenize")
    else:
        # The proof takes half a second, in which the workers start: what they make before it fails is not kept.
        with ThreadPoolExecutor(1) as thread:
            proving = thread.submit(_prove, name, source, parts, info, differs)
            results = encode(name, "tokenize")
            proof = proving.result()
        checked = proof.checked
        if proof.fault or differs.exists() or any("difference" in result for result in results):
            faults = [proof.fault, *(result.get("difference", "") for result in results), f"{name} differs"]
            fault = next(fault for fault in faults if fault)
            print(f"tokenize: {fault}: all is encoded again with the reference", file=sys.stderr)
            name, left, checked = REFERENCE, name, Checked()
            results = encode(REFERENCE, "tokenize with the reference")
    encoder = _encoder_record(name, results, checked, left)
    results = ready.results(results)
    shards = results
    if shuffled and any(result["documents"] for result in results):
        assert options.shuffle_seed is not None
        filled = [number for number, result in enumerate(results) if result["documents"]]
        shards = shuffle(
            work,
            [prefixes[number] for number in filled],
            [results[number] for number in filled],
            dtype=dtype,
            seed=options.shuffle_seed,
            sentences=options.sentences,
        )
    return EncodedShards(results, shards, ready.parts, encoder, ready.content)


def _encoder_of(work: Work, folder: Path) -> str:
    """The encoder of the whole job: what whichever of its processes was first had installed, or the reference."""
    from data_prep import durable
    from data_prep.fast_encoders import fast_encoder_for

    path = work.scratch / "encoder.json"
    durable.create(path, durable.json_bytes({"name": fast_encoder_for(folder) or REFERENCE}))
    return str(read_json(path)["name"])


def _prove(name: str, source: Source, parts: list[Part], info: "TokenizerInfo", differs: Path) -> "Proof":
    """`encoder_check.prove` on the beginning of the input; where it fails, the file `differs` tells the workers."""
    from data_prep.encoder_check import prove

    proof = prove(name, info.folder, info.fingerprint, _first_texts(source, parts))
    if proof.fault:
        differs.touch()
    return proof


def _first_texts(source: Source, parts: list[Part]) -> list[str]:
    """The documents of about the first megabyte of the input, of the first parts that hold any."""
    texts: list[str] = []
    size = 0
    for text in itertools.chain.from_iterable(read_texts(part, source.reading) for part in parts):
        texts.append(text[: _CHECKED_BYTES - size])
        size += len(text)
        if size >= _CHECKED_BYTES:
            break
    return texts


def _encoder_record(name: str, results: list[dict[str, Any]], checked: "Checked", left: str | None) -> dict[str, Any]:
    """What the manifest says of the encoder, of all machines' parts together."""
    used = sorted({tuple(result["encoder"]) for result in results})
    record: dict[str, Any] = {
        "name": name,
        "versions": [version for _, version in used],
        "checked_before": asdict(checked),
        "checked_during": {
            "documents": sum(result["checked_documents"] for result in results),
            "tokens": sum(result["checked_tokens"] for result in results),
        },
        "documents_left_to_the_reference": sum(result["reference_documents"] for result in results),
    }
    if left:
        record["differed"] = left
    return record


def _dtype(name: str, info: "TokenizerInfo") -> "np.dtype[Any]":
    """Raises UserError for a vocabulary that the dtype does not hold."""
    import numpy as np

    from data_prep.shards import UINT16_VOCABULARY, dtype_for

    if info.vocab_size > 1 << 31:
        raise UserError(f"{info.folder}: ids up to {info.vocab_size - 1} do not fit int32")
    if name == "uint16" and info.vocab_size >= UINT16_VOCABULARY:
        raise UserError(
            f"--dtype uint16: the vocabulary of {info.folder} has {info.vocab_size} ids, expected fewer than"
            f" {UINT16_VOCABULARY}; take --dtype int32, or auto"
        )
    return dtype_for(info.vocab_size) if name == "auto" else np.dtype(name).newbyteorder("<")


@dataclass(frozen=True)
class _Totals:
    """Totals for the line that ends a job."""

    documents: int
    tokens: int
    text_bytes: int
    shards: int
    dtype: str
    encoder: str
    seconds: dict[str, float]
    steps: list[str]

    def describe(self, output_dir: Path, seconds: float) -> str:
        busy = sum(self.seconds.values())
        shares = ", ".join(f"{name} {value / busy:.0%}" for name, value in self.seconds.items() if value)
        return (
            f"{output_dir}: {self.documents:,} documents, {self.tokens:,} tokens"
            f" ({self.text_bytes / self.tokens:.2f} bytes a token) in {self.shards} shards of {self.dtype};"
            f" {seconds:.1f} s, {self.text_bytes / 1e6 / seconds:.1f} MB/s\n"
            f"  encoded by {self.encoder}; the workers' time: {shares}" + "".join(f"\n{line}" for line in self.steps)
        )


def _write_manifest(
    work: Work,
    encoded: EncodedShards,
    info: "TokenizerInfo",
    dtype: "np.dtype[Any]",
    options: TokenizeOptions,
) -> _Totals:
    """Writes the manifest and removes shards of no part; raises UserError where there are no documents."""
    from data_prep.sentences import SUFFIX
    from data_prep.shards import KIND

    output_dir, results = work.output_dir, encoded.results
    apart = ("files", "encoder", "reference_documents", "checked_documents", "checked_tokens", "documents", "tokens")
    totals = merge([{key: value for key, value in result.items() if key not in apart} for result in results])
    seconds = totals.pop("seconds", {})
    shards = [
        {"name": f"{number:06d}", "documents": shard["documents"], "tokens": shard["tokens"]}
        for number, shard in enumerate(encoded.shards)
        if shard["documents"]  # a part may hold none: only blank documents, or the middle of one long line
    ]
    kept = {shard["name"] for shard in shards}
    for path in [path for suffix in (".idx", ".bin", SUFFIX) for path in output_dir.glob(f"*{suffix}")]:
        if path.stem not in kept or (path.suffix == SUFFIX and not options.sentences):
            path.unlink()  # of an earlier, killed run
    if not shards:
        inputs = sorted({part.path for part in encoded.parts})
        raise UserError(f"the input holds no text: {len(inputs)} files{f' such as {inputs[0]}' if inputs else ''}")
    content = {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        **totals,
        **encoded.content,
        "dtype": dtype.name,
        "tokenizer": {
            "fingerprint": info.fingerprint,
            "vocab_size": info.vocab_size,
            "end_of_document": info.special.end_of_document,
        },
        "encoder": encoded.encoder,
        "shards": shards,
        "sources": _sources(encoded.parts, results),
    }
    files = write_side_files(output_dir, content)
    for shard in encoded.shards:
        files |= {name: FileRecord(**record) for name, record in shard["files"].items()}
    Manifest(kind=KIND, job=work.job, files=files, content=content).write(output_dir)
    return _Totals(
        documents=content["documents"],
        tokens=content["tokens"],
        text_bytes=content["text_bytes"],
        shards=len(shards),
        dtype=dtype.name,
        encoder=f"{encoded.encoder['name']} ({', '.join(encoded.encoder['versions'])})",
        seconds=seconds,
        steps=describe_steps(content),
    )


def _sources(parts: list[Part], results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Documents and tokens of each input, of the 1,000 with most tokens."""
    sources: dict[str, dict[str, int]] = {}
    for part, result in zip(parts, results, strict=True):
        counts = sources.setdefault(part.path, {"documents": 0, "tokens": 0})
        counts["documents"] += result["documents"]
        counts["tokens"] += result["tokens"]
    largest = sorted(sources.items(), key=lambda item: (-item[1]["tokens"], item[0]))[:_SOURCES_SHOWN]
    return dict(sorted(largest))


def main(arguments: argparse.Namespace, upstream: Source | None = None) -> None:
    source = upstream or Source(tuple(arguments.input), ReadOptions.of(arguments))
    options = TokenizeOptions(arguments.encoder, arguments.dtype, arguments.sentences, arguments.shuffle_seed)
    tokenize_source(source, arguments.tokenizer, arguments.output_dir, options, Execution.of(arguments))
