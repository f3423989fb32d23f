"""Rows of 1,025 tokens out of a numpy memory map at random places: no documents, no epochs, no order kept.

python memmap_loop.py slices|nanogpt|gather BIN BATCH SECONDS
slices: a loop of slices, stacked. nanogpt: karpathy/nanoGPT's get_batch, inputs and targets as int64 tensors. gather:
one index operation a batch.
"""

import sys

import numpy as np
from measuring import read_ahead, samples_per_second

SEQUENCE_LENGTH = 1024


def main(mode: str, bin_path: str, batch_size: str, seconds: str) -> None:
    size = int(batch_size)
    read_ahead(bin_path)
    tokens = np.memmap(bin_path, dtype=np.uint16, mode="r")
    generator = np.random.default_rng(1234)
    inside = np.arange(SEQUENCE_LENGTH + 1)

    def starts() -> np.ndarray:
        return generator.integers(0, len(tokens) - SEQUENCE_LENGTH, size)

    def slices(step: int) -> object:
        return np.stack([tokens[start : start + SEQUENCE_LENGTH + 1] for start in starts()])

    def gather(step: int) -> object:
        return tokens[starts()[:, None] + inside]

    def nanogpt(step: int) -> object:
        chosen = starts()
        return tuple(
            torch.stack(
                [torch.from_numpy(tokens[start : start + SEQUENCE_LENGTH].astype(np.int64)) for start in chosen + shift]
            )
            for shift in (0, 1)
        )

    if mode == "nanogpt":
        import torch

        torch.set_num_threads(1)
    samples_per_second({"slices": slices, "gather": gather, "nanogpt": nanogpt}[mode], size, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
