"""datatrove's two tokenizing steps: DocumentTokenizer over the files, then DocumentTokenizerMerger. Without shuffling.

python datatrove_tokenize.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    config = json.loads(Path(tokenizer, "tokenizer_config.json").read_text())
    first = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(inputs[0]).parent), glob_pattern="*.jsonl"),
            DocumentTokenizer(
                f"{output}/parts",
                tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
                eos_token=config.get("eos_token") or config["sep_token"],
                shuffle_documents=False,
            ),
        ],
        tasks=len(inputs),
        workers=int(workers),
        logging_dir=f"{output}/logs/1",
    )
    second = LocalPipelineExecutor(
        pipeline=[
            DocumentTokenizerMerger(
                f"{output}/parts", f"{output}/merged", save_filename="corpus", shuffle=False, progress=False
            )
        ],
        tasks=1,
        logging_dir=f"{output}/logs/2",
        depends=first,
    )
    second.run()
    total = sum(path.stat().st_size for path in Path(output, "merged").glob("*.ds")) // 2
    print(json.dumps({"tokens": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
