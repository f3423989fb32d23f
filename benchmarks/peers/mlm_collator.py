"""transformers' DataCollatorForLanguageModeling on rows that are ready in memory.

python mlm_collator.py token|word ROWS.npz TOKENIZER BATCH SECONDS               the collator, called with examples
python mlm_collator.py token_alone|word_alone ROWS.npz TOKENIZER BATCH SECONDS   its masking function alone
ROWS.npz: ids, special [rows, sequence], offsets [rows, sequence, 2]. Each in its fastest way: numpy, faster than torch
here; without a ready special_tokens_mask, for which tokenizer.pad would go over every token; lists, not arrays, of
what whole words need. The functions alone get whole batches and ready masks: nothing is looked up, padded or stacked.
"""

import sys
import warnings

import numpy as np
import torch
from measuring import samples_per_second
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

warnings.simplefilter("ignore")  # whole words: "random token replacement is not supported"


def main(mode: str, rows_path: str, tokenizer: str, batch_size: str, seconds: str) -> None:
    torch.set_num_threads(1)
    unit, _, alone = mode.partition("_")
    size = int(batch_size)
    collator = DataCollatorForLanguageModeling(
        AutoTokenizer.from_pretrained(tokenizer), whole_word_mask=unit == "word", return_tensors="np"
    )
    with np.load(rows_path) as rows:
        ids = rows["ids"].astype(np.int64)
        more = {"special_tokens_mask": rows["special"].astype(np.int64)}
        if unit == "word":
            more["offset_mapping"] = rows["offsets"].astype(np.int64)
    count = len(ids) // size * size
    examples: list[object] = list(ids)
    if unit == "word":
        columns = {"input_ids": ids, **more}
        examples = [{name: column[row].tolist() for name, column in columns.items()} for row in range(count)]

    def call(step: int) -> object:
        first = step * size % count
        return collator(examples[first : first + size])

    def function_alone(step: int) -> object:
        batch = slice(step * size % count, step * size % count + size)
        return collator.numpy_mask_tokens(ids[batch].copy(), **{name: column[batch] for name, column in more.items()})

    samples_per_second(function_alone if alone else call, size, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
