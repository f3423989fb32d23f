"""Megatron-LM's tools/preprocess_data.py in its structure: a pool's imap over lines, one document an encode call, lists
of ints back to the parent, which writes. In the peer's favour: `tokenizers` itself instead of transformers' wrapper
around it, and numpy instead of a torch tensor a document.

python megatron_loop.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import json
import multiprocessing
import struct
import sys
from pathlib import Path

import numpy as np

CHUNK = 32  # preprocess_data.py's


class Encoder:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def initializer(self) -> None:
        from tokenizers import Tokenizer

        Encoder.tokenizer = Tokenizer.from_file(f"{self.folder}/tokenizer.json")
        Encoder.end = end_of_document(self.folder, Encoder.tokenizer)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        ids = Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        ids.append(Encoder.end)
        return ids, [len(ids)], len(line)


def end_of_document(folder: str, tokenizer) -> int:
    config = json.loads(Path(folder, "tokenizer_config.json").read_text())
    return tokenizer.token_to_id(config.get("eos_token") or config["sep_token"])


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    Path(output).mkdir(parents=True)
    encoder = Encoder(tokenizer)
    total = 0
    for number, name in enumerate(inputs):
        lengths: list[int] = []
        with (
            open(name, encoding="utf-8") as lines,
            multiprocessing.Pool(int(workers), initializer=encoder.initializer) as pool,
            open(f"{output}/{number}.bin", "wb") as tokens,
        ):
            for ids, sizes, _ in pool.imap(encoder.encode, lines, CHUNK):
                tokens.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
                lengths.extend(sizes)
        sizes_array = np.array(lengths, dtype=np.int32)
        pointers = (np.cumsum(sizes_array, dtype=np.int64) - sizes_array) * 2
        with open(f"{output}/{number}.idx", "wb") as index:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
            index.write(sizes_array.tobytes() + pointers.tobytes())
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        total += int(sizes_array.sum())
    print(json.dumps({"tokens": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
