"""A loop around tiktoken with the ranks of the same byte-level BPE: N processes over lines, bytes of ids back.

python tiktoken_loop.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import functools
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import orjson
from megatron_loop import end_of_document

# GPT-2's pattern, which `tokenizers`' ByteLevel uses.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CHUNK = 64


def byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's bytes_to_unicode."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}


@functools.cache
def load(folder: str):
    import tiktoken
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    table = byte_of_character()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ranks = {bytes(table[c] for c in piece): n for piece, n in tokenizer.get_vocab().items() if piece not in special}
    encoding = tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return encoding, end_of_document(folder, tokenizer)


def encode(folder: str, line: bytes) -> bytes:
    encoding, end = load(folder)
    ids = encoding.encode_ordinary(orjson.loads(line)["text"])
    ids.append(end)
    return np.array(ids, dtype=np.uint16).tobytes()


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    Path(output).mkdir(parents=True)
    size = 0
    with multiprocessing.Pool(int(workers)) as pool, open(f"{output}/tokens.bin", "wb") as tokens:
        for name in inputs:
            with open(name, "rb") as lines:
                for ids in pool.imap(functools.partial(encode, tokenizer), lines, CHUNK):
                    size += tokens.write(ids)
    print(json.dumps({"tokens": size // 2}))


if __name__ == "__main__":
    main(*sys.argv[1:])
