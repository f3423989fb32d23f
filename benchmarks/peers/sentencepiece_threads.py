"""sentencepiece with its own threads: batches of documents to encode(..., num_threads=N), ids to one file.

python sentencepiece_threads.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import orjson
import sentencepiece
from megatron_loop import end_of_document
from tokenizers import Tokenizer

BATCH = 1000


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    Path(output).mkdir(parents=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/tokenizer.model")
    end = end_of_document(tokenizer, Tokenizer.from_file(f"{tokenizer}/tokenizer.json"))
    total = 0
    with open(f"{output}/tokens.bin", "wb") as tokens:
        for name in inputs:
            with open(name, "rb") as lines:
                for batch in batched(lines):
                    texts = [orjson.loads(line)["text"] for line in batch]
                    for ids in processor.encode(texts, num_threads=int(workers)):
                        ids.append(end)
                        tokens.write(np.array(ids, dtype=np.uint16).tobytes())
                        total += len(ids)
    print(json.dumps({"tokens": total}))


def batched(lines):
    while batch := list(itertools.islice(lines, BATCH)):
        yield batch


if __name__ == "__main__":
    main(*sys.argv[1:])
