"""datatrove's rules and near deduplication: Gopher repetition and quality, C4, FineWeb, then MinHash's four steps.

The order and the settings are FineWeb's (C4 without its terminal-punctuation rule). One process. Its exact
deduplication is left out, in its favour.

python datatrove_clean.py OUTPUT_DIR INPUT...
"""

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main(output: str, *inputs: str) -> None:
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5)
    tasks = len(inputs)

    def run(number: int, tasks: int, pipeline: list) -> None:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{output}/logs/{number}").run()

    run(
        1,
        tasks,
        [
            JsonlReader(str(Path(inputs[0]).parent), glob_pattern="*.jsonl"),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(filter_no_terminal_punct=False),
            FineWebQualityFilter(),
            JsonlWriter(f"{output}/clean", compression=None),
        ],
    )
    kept = JsonlReader(f"{output}/clean")
    run(2, tasks, [kept, MinhashDedupSignature(f"{output}/signatures", config=config)])
    run(3, 14, [MinhashDedupBuckets(f"{output}/signatures", f"{output}/buckets", config=config)])
    run(4, 1, [MinhashDedupCluster(f"{output}/buckets", f"{output}/remove", config=config)])
    run(
        5,
        tasks,
        [kept, MinhashDedupFilter(f"{output}/remove"), JsonlWriter(f"{output}/unique", compression=None)],
    )
    documents = sum(path.read_bytes().count(b"\n") for path in Path(output, "unique").glob("*.jsonl"))
    print(json.dumps({"documents": documents}))


if __name__ == "__main__":
    main(*sys.argv[1:])
