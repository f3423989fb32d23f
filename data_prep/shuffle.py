"""Global shuffle of tokenized documents: every order of all documents of a set is (almost) equally likely, and the
order is a pure function of the seed and of the documents before it.

Output shard j takes the documents at places [j n / s, (j + 1) n / s) of a keyed permutation of all n documents
(`randomness.permute`), which costs no memory; they are gathered from the unshuffled shards through memory maps. The
memory of a worker is that of one output shard, about 128 MiB of token ids, and 50 bytes for each of its documents.
Sentence starts travel along.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.manifest import read_json
from data_prep.parts import Report, Work
from data_prep.randomness import permute
from data_prep.sentences import Sentences, SentencesWriter
from data_prep.shards import Shard, ShardWriter

SHARD_BYTES = 1 << 27
_PLAN_NAME = "shuffle.json"


def shuffle(
    work: Work,
    prefixes: Sequence[Path],
    results: Sequence[dict[str, Any]],
    *,
    dtype: np.dtype[Any],
    seed: int,
    sentences: bool,
    shard_bytes: int = SHARD_BYTES,
) -> list[dict[str, Any]]:
    """Writes the documents of the shards `prefixes` to new shards in the job's folder, in shuffled order.

    prefixes, results: of every shard that holds documents, and what its part's function returned: its documents,
    tokens and files. Returns the same of the new shards.
    """
    count = max(1, -(-sum(result["tokens"] for result in results) * dtype.itemsize // shard_bytes))
    documents = [result["documents"] for result in results]
    plan = {
        "prefixes": [str(prefix) for prefix in prefixes],
        "documents": documents,
        "dtype": dtype.str,
        "seed": seed,
        "sentences": sentences,
        "shards": min(count, sum(documents)),
    }
    path = work.scratch / _PLAN_NAME
    durable.write_json(path, plan)
    total = sum(result["tokens"] for result in results) * dtype.itemsize
    shards = plan["shards"]
    return work.run(
        write_shuffled,
        [(str(path), number, str(work.output_dir / f"{number:06d}")) for number in range(shards)],
        part_inputs=[[] for _ in range(shards)],  # it depends on the phase before
        part_bytes=[total * (number + 1) // shards - total * number // shards for number in range(shards)],
        description="shuffle",
    )


def write_shuffled(plan_path: str, number: int, prefix: str, report: Report) -> dict[str, Any]:
    """Writes output shard `number` of the plan; returns its counts and file records."""
    plan = read_json(Path(plan_path))
    ends = np.cumsum(plan["documents"])
    total = int(ends[-1])
    places = np.arange(total * number // plan["shards"], total * (number + 1) // plan["shards"])
    order = permute(places, total, plan["seed"])
    lengths = np.empty(len(order), dtype=np.int64)
    offsets = np.empty(len(order), dtype=np.int64)
    for source, rows, documents in _by_source(order, ends):
        shard = Shard(Path(plan["prefixes"][source]))
        offsets[rows] = shard.offsets_of(documents)
        lengths[rows] = shard.offsets_of(documents + 1) - offsets[rows]
    into = np.cumsum(lengths) - lengths
    dtype = np.dtype(plan["dtype"])
    ids = np.empty(int(lengths.sum()), dtype=dtype)
    starts: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)] * len(order)
    for source, rows, documents in _by_source(order, ends):
        tokens = Shard(Path(plan["prefixes"][source])).tokens
        for at, offset, length in zip(into[rows].tolist(), offsets[rows].tolist(), lengths[rows].tolist(), strict=True):
            ids[at : at + length] = tokens[offset : offset + length]
        if plan["sentences"]:
            of_source = Sentences(Path(plan["prefixes"][source]))
            for row, document in zip(rows.tolist(), documents.tolist(), strict=True):
                starts[row] = of_source.document(document)[1:]
        report(len(rows), int(lengths[rows].sum()) * dtype.itemsize)
    with ShardWriter(Path(prefix), dtype) as writer:
        writer.append_batch(ids, lengths)
    files = dict(writer.files)
    if plan["sentences"]:
        sentences = SentencesWriter(Path(prefix))
        counts = np.fromiter(map(len, starts), dtype=np.int64, count=len(starts))
        sentences.append_batch(np.concatenate(([0], np.cumsum(counts))), np.concatenate(starts))
        files |= sentences.write()
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "files": {name: vars(record) for name, record in files.items()},
    }


def _by_source(
    order: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(source shard, rows of `order` that lie in it, their documents there), in the order in which they lie."""
    rows = np.argsort(order)
    sources = np.searchsorted(ends, order[rows], side="right")
    cuts = np.flatnonzero(np.diff(sources)) + 1
    for of_source in np.split(np.arange(len(rows)), cuts):
        source = int(sources[of_source[0]])
        begin = int(ends[source - 1]) if source else 0
        yield source, rows[of_source], order[rows[of_source]] - begin
