"""datasets.map(batched=True, num_proc=N) over a JSON data set, then one file of token ids.

python datasets_map.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import functools
import json
import sys
from pathlib import Path

import datasets
import numpy as np
from megatron_loop import end_of_document
from tokenizers import Tokenizer


@functools.cache
def load(folder: str) -> tuple[Tokenizer, int]:
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return tokenizer, end_of_document(folder, tokenizer)


def encode(batch: dict, folder: str) -> dict:
    tokenizer, end = load(folder)
    return {"ids": [[*one.ids, end] for one in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    Path(output).mkdir(parents=True)
    datasets.disable_progress_bars()
    corpus = datasets.load_dataset("json", data_files=list(inputs), split="train", cache_dir=f"{output}/cache")
    encoded = corpus.map(
        encode,
        batched=True,
        num_proc=int(workers),
        remove_columns=corpus.column_names,
        fn_kwargs={"folder": tokenizer},
    )
    total = 0
    with open(f"{output}/tokens.bin", "wb") as tokens:
        for batch in encoded.with_format("arrow").iter(1000):
            ids = batch["ids"].combine_chunks().flatten().to_numpy().astype(np.uint16)
            tokens.write(ids.tobytes())
            total += len(ids)
    print(json.dumps({"tokens": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
