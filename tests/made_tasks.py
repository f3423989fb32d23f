"""Small models with tokenizers, and data in the benchmarks' own formats, for tests of fine-tuning and evaluation."""

import json
import random
from pathlib import Path
from typing import Any

from pipeline.tasks.glue import TASKS

GOOD = ("good", "fine", "great", "bright", "warm")
BAD = ("bad", "poor", "cold", "grim", "dull")
FILLERS = ("the", "a", "film", "story", "was", "and", "very", "with", "actor", "scene", "of", "in")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = tuple(f"name{index}" for index in range(40))
WORDS = (*GOOD, *BAD, *FILLERS, *NUMBERS, *NAMES, "who", "is", "?", ".", ",", "=", "'", '"', "not")


def make_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder with random weights and a tokenizer of whole words: kind "bert" (masked LM) or "gpt2" (causal)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if kind == "bert" else ["<end>", "[UNK]"]
    words = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
        )
        roles = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
    else:
        roles = {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    common = {"vocab_size": len(words), "attn_implementation": "sdpa"}
    if kind == "bert":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        }
        config = BertConfig(**{**common, **sizes, "pad_token_id": 0, **changes})
        model: Any = BertForMaskedLM
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        config = GPT2Config(**{**common, **sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})
        model = GPT2LMHeadModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    return folder


def review(generator: random.Random) -> tuple[str, int]:
    """A text with one word that says what its author thinks, and 1 if that is good."""
    label = generator.randrange(2)
    words = generator.choices(FILLERS, k=generator.randint(3, 9))
    words.insert(generator.randint(0, len(words)), generator.choice((BAD, GOOD)[label]))
    return " ".join(words), label


def write_reviews(data_dir: Path, train: int, dev: int, test: int = 0, seed: int = 0) -> Path:
    """SST-2's files with that many reviews."""
    folder = data_dir / TASKS["sst2"].folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for name, count in (("train", train), ("dev", dev)):
        rows = [review(generator) for _ in range(count)]
        lines = [f"{text}\t{label}\n" for text, label in rows]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    if test:
        lines = [f"{index}\t{review(generator)[0]}\n" for index in range(test)]
        (folder / "test.tsv").write_text("index\tsentence\n" + "".join(lines))
    return folder


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
