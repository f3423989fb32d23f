"""Rows of 1,024 tokens in an Arrow file of `datasets`, as transformers' run_clm leaves them (group_texts), shuffled.

python arrow_rows.py write BIN FILE.arrow                       the rows of a .bin of uint16 tokens
python arrow_rows.py trainer|rows|batch|buffer FILE.arrow BATCH SECONDS
trainer: as the DataLoader of run_clm's Trainer fetches and collates. rows: dataset[i] as numpy, row by row, stacked.
batch: dataset[indices] as numpy (faster than as torch). buffer: dataset[indices] as an Arrow table, its buffer taken
as it is: int32, neither converted nor copied again.
In the peer's favour: the column input_ids alone, without attention_mask and labels.
"""

import sys
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import torch
from measuring import read_ahead, samples_per_second

SEQUENCE_LENGTH = 1024
ROWS_A_BATCH = 1000  # of the file: datasets' own writer_batch_size


def write(bin_path: str, arrow_path: str) -> None:
    from datasets.arrow_writer import ArrowWriter

    tokens = np.memmap(bin_path, dtype=np.uint16, mode="r")
    rows = len(tokens) // SEQUENCE_LENGTH
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    with ArrowWriter(path=arrow_path, features=features) as writer:
        for first in range(0, rows, ROWS_A_BATCH):
            count = min(ROWS_A_BATCH, rows - first)
            values = tokens[first * SEQUENCE_LENGTH : (first + count) * SEQUENCE_LENGTH].astype(np.int32)
            offsets = np.arange(count + 1, dtype=np.int32) * SEQUENCE_LENGTH
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
            writer.write_table(pa.table({"input_ids": column}))
        writer.finalize()


def reader(mode: str, dataset: datasets.Dataset) -> Callable[[list[int]], object]:
    """The batch [batch, 1024] of these rows."""
    if mode == "trainer":
        from transformers import default_data_collator

        return lambda indices: default_data_collator(dataset.__getitems__(indices))["input_ids"]
    formatted = dataset.with_format("arrow" if mode == "buffer" else "numpy")
    if mode == "rows":
        return lambda indices: np.stack([formatted[index]["input_ids"] for index in indices])
    if mode == "batch":
        return lambda indices: formatted[indices]["input_ids"]
    return lambda indices: (
        formatted[indices]["input_ids"].combine_chunks().flatten().to_numpy().reshape(len(indices), SEQUENCE_LENGTH)
    )


def main(mode: str, *arguments: str) -> None:
    if mode == "write":
        write(*arguments)
        return
    arrow_path, size, seconds = arguments[0], int(arguments[1]), float(arguments[2])
    torch.set_num_threads(1)
    read_ahead(arrow_path)
    dataset = datasets.Dataset.from_file(arrow_path)
    order = np.random.default_rng(1234).permutation(len(dataset))
    batch_of = reader(mode, dataset)

    def make(step: int) -> object:
        return batch_of(np.take(order, range(step * size, (step + 1) * size), mode="wrap").tolist())

    assert tuple(make(0).shape) == (size, SEQUENCE_LENGTH)
    samples_per_second(make, size, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
