"""Small exported models for tests: the folders that pipeline.export writes, with weights drawn at random."""

from pathlib import Path
from typing import Any

import torch

from data_prep.encoding import load_tokenizer_info
from pipeline.export import write_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "causal": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "mlm": {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
}


def made_model(folder: Path, objective: str, tokenizer: Path, **changes: Any) -> Path:
    """Writes a GPT-2 or BERT with this tokenizer into `folder`, in float32 and far enough from its initialisation to
    prefer some tokens."""
    from transformers import AutoConfig

    from pipeline.model import auto_class, longest_input

    info = load_tokenizer_info(tokenizer)
    special = {"bos_token_id": info.special.end_of_document, "eos_token_id": info.special.end_of_document}
    values = {"vocab_size": info.vocab_size, "pad_token_id": info.special.padding, **special}
    values |= {"initializer_range": 0.3, **SIZES[objective], **changes}
    torch.manual_seed(1)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto_class(objective).from_config(config).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, objective, longest_input(config))
    return folder
