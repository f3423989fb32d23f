"""megatron-core's GPTDataset over one .bin and .idx, one epoch, without its attention masks (its fastest way).

python gpt_dataset.py first PREFIX CACHE BATCH              its indices built, or found in CACHE, and the first batch
python gpt_dataset.py items|collate|documents PREFIX CACHE BATCH SECONDS
items: __getitem__ alone. collate: and torch's default_collate, as a DataLoader calls it. documents: and positions that
restart at every document (its reset_position_ids), which is what ours gives.
"""

import sys
import types
import warnings

import numpy as np
import torch
from measuring import FirstBatch, read_ahead, samples_per_second
from torch.utils.data import default_collate

warnings.simplefilter("ignore")  # it looks for CUDA libraries
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

SEQUENCE_LENGTH = 1024
END_OF_DOCUMENT = 0


def open_dataset(prefix: str, cache: str, reset_position_ids: bool = False) -> GPTDataset:
    # What the configuration asks of a tokenizer; no text is tokenized.
    tokenizer = types.SimpleNamespace(vocab_size=32_000, eod=END_OF_DOCUMENT, pad=-1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, prefix, indices, None, Split.train, config)


def main(mode: str, prefix: str, cache: str, batch_size: str, seconds: str = "0") -> None:
    torch.set_num_threads(1)
    size = int(batch_size)
    if mode == "first":
        from megatron.core.datasets import helpers  # noqa: F401  an import of its own, not to be counted

        first = FirstBatch()
        dataset = open_dataset(prefix, cache)
        default_collate([dataset[number] for number in range(size)])
        first.report()
        return
    read_ahead(f"{prefix}.bin")
    dataset = open_dataset(prefix, cache, reset_position_ids=mode == "documents")
    collate = list if mode == "items" else default_collate

    def make(step: int) -> object:
        return collate([dataset[number % len(dataset)] for number in range(step * size, (step + 1) * size)])

    samples_per_second(make, size, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
