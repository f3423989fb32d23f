"""The writer of documents: what a source yields as JSONL, one file a part, and the folder's manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.documents import REJECTED_NAME, Part
from data_prep.manifest import FileRecord, Manifest
from data_prep.parts import Report, Work
from data_prep.stream import DocumentStream, Source, merge

KIND = "documents"
SAMPLES_NAME = "samples.json"


def write_part(source: Source, part: Part, number: int, path: str, report: Report) -> dict[str, Any]:
    """Writes the documents of one part to `path` as JSON lines; no file where there are none."""
    stream = DocumentStream(source, part, number, report)
    documents = text_bytes = size = 0
    digest = hashlib.sha256()
    with durable.replacing(Path(path)) as output:
        for batch in stream:
            lines = b"".join(batch.json_lines(source.reading.text_field))
            output.write(lines)
            digest.update(lines)
            size += len(lines)
            documents += len(batch.texts)
            text_bytes += sum(batch.sizes())
    if not documents:
        Path(path).unlink()
    return {
        **stream.summary(),
        "documents": documents,
        "text_bytes": text_bytes,
        "file": {"bytes": size, "sha256": digest.hexdigest()},
    }


def write_documents(work: Work, source: Source, description: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes every part of `source` as `documents-NNNNNN.jsonl` in the job's folder.

    Returns the parts' results, and what a pass of the source's own found, for the manifest (`Ready.content`).
    """
    ready = source.ready(work)
    parts = ready.source.parts()
    results = work.run(
        write_part,
        [(ready.source, part, number, str(work.output_dir / part_name(number))) for number, part in enumerate(parts)],
        part_inputs=[[part.path] for part in parts],
        part_bytes=[part.bytes for part in parts],
        description=description,
    )
    return ready.results(results), ready.content


def part_name(number: int) -> str:
    return f"documents-{number:06d}.jsonl"


def finish_documents(output_dir: Path, job: dict[str, Any], results: list[dict[str, Any]], **content: Any) -> Manifest:
    """Writes the folder's samples, rejections and manifest from the results of `write_documents`."""
    totals = merge([{key: value for key, value in result.items() if key != "file"} for result in results])
    files = {
        part_name(number): FileRecord(**result["file"]) for number, result in enumerate(results) if result["documents"]
    }
    for path in output_dir.glob("documents-*.jsonl"):
        if path.name not in files:  # of an earlier, killed run over more parts
            path.unlink()
    files |= write_side_files(output_dir, totals)
    manifest = Manifest(kind=KIND, job=job, files=files, content={**totals, **content})
    manifest.write(output_dir)
    return manifest


def write_side_files(output_dir: Path, totals: dict[str, Any]) -> dict[str, FileRecord]:
    """Takes samples and rejections out of merged `totals` into files of their own; counts stay."""
    files = {}
    samples = {name: step.pop("samples") for name, step in totals.get("steps", {}).items() if step.get("samples")}
    rejected = totals.pop("rejected", [])
    if samples:
        durable.write_json(output_dir / SAMPLES_NAME, samples)
        files[SAMPLES_NAME] = FileRecord.of(output_dir / SAMPLES_NAME)
    if rejected:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
        durable.write_bytes(output_dir / REJECTED_NAME, lines.encode(errors="backslashreplace"))
        files[REJECTED_NAME] = FileRecord.of(output_dir / REJECTED_NAME)
    return files
