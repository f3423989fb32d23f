"""Small folders as the stages leave them, written from given texts without running any stage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import durable
from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.manifest import FileRecord, Manifest
from data_prep.shards import ShardWriter, dtype_for
from data_prep.write_documents import REJECTED_NAME, SAMPLES_NAME

EVIL = (
    '<script>alert(1)</script></pre></details><img src="http://evil.example/x" onerror=alert(2)>'
    " \"quoted\" & 'single' \x00\x1b[31m\u202egnp.exe \ud800 שלום 日本語 👍🏽"
)


def make_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int = 400, unknown: bool = False) -> Path:
    """A byte-level BPE tokenizer of `texts`; one of words, with an unknown token, where `unknown` is set."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if unknown:
        tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=["</s>", "<unk>"])
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>"} | ({"unk_token": "<unk>"} if unknown else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    files = {path.name: FileRecord.of(path) for path in folder.iterdir()}
    Manifest("tokenizer", {"command": "train_tokenizer"}, files, {"vocab_size": vocab_size}).write(folder)
    return folder


def bit_lengths(texts: Sequence[str]) -> dict[str, int]:
    """Texts by the bit length of their size, as a stage counts them."""
    bits = [len(text.encode("utf-8", "replace")).bit_length() for text in texts]
    return {str(value): bits.count(value) for value in sorted(set(bits))}


def make_documents(
    folder: Path,
    read: Sequence[str],
    left: Sequence[str],
    *,
    steps: dict[str, Any] | None = None,
    samples: dict[str, Any] | None = None,
    rejected: Sequence[dict[str, Any]] = (),
    command: str = "clean",
) -> Path:
    """A documents folder of two files."""
    folder.mkdir(parents=True)
    names = []
    for number, texts in enumerate((left[: len(left) // 2], left[len(left) // 2 :])):
        names.append(f"documents-{number:06d}.jsonl")
        (folder / names[-1]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if samples:
        names.append(SAMPLES_NAME)
        (folder / SAMPLES_NAME).write_text(json.dumps(samples))
    if rejected:
        names.append(REJECTED_NAME)
        (folder / REJECTED_NAME).write_text("".join(json.dumps(record) + "\n" for record in rejected))
    categories = [str(record["category"]) for record in rejected]
    content = {
        "read": {"documents": len(read), "bytes": sum(len(text.encode()) for text in read)},
        "rejected_documents": {category: categories.count(category) for category in sorted(set(categories))},
        "lengths": {"read": bit_lengths(read), "left": bit_lengths(left)},
        "steps": steps or {},
        "documents": len(left),
        "text_bytes": sum(len(text.encode()) for text in left),
    }
    job = {"command": command, "input": ["raw/*.jsonl"], "reading": {"text_field": "text"}}
    Manifest("documents", job, {name: FileRecord.of(folder / name) for name in names}, content).write(folder)
    return folder


def make_shards(
    folder: Path, texts: Sequence[str], tokenizer: Path, *, shards: int = 2, sources: Any = None, **content: Any
) -> Path:
    """Shards of `texts`, in turn, with sentence starts (of one sentence a document) beside them."""
    folder.mkdir(parents=True)
    info, encoder = load_tokenizer_info(tokenizer), Encoder(tokenizer)
    files: dict[str, FileRecord] = {}
    counts = []
    for number in range(shards):
        name = f"{number:06d}"
        with ShardWriter(folder / name, dtype_for(info.vocab_size)) as writer:
            for ids in encoder.encode_batch(list(texts[number::shards])):
                writer.append(np.append(ids, info.special.end_of_document))
        durable.write_bytes(folder / f"{name}.sentences", np.zeros(writer.documents, "<u4").tobytes())
        files |= writer.files | {f"{name}.sentences": FileRecord.of(folder / f"{name}.sentences")}
        counts.append({"name": name, "documents": writer.documents, "tokens": writer.tokens})
    totals = {
        "documents": sum(shard["documents"] for shard in counts),
        "tokens": sum(shard["tokens"] for shard in counts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "dtype": dtype_for(info.vocab_size).name,
        "tokenizer": {
            "fingerprint": info.fingerprint,
            "vocab_size": info.vocab_size,
            "end_of_document": info.special.end_of_document,
        },
        "shards": counts,
        "read": {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)},
        "rejected_documents": {},
        "lengths": {"read": bit_lengths(texts), "left": bit_lengths(texts)},
        "steps": {},
        "sources": sources or {"left/documents-000000.jsonl": {"documents": len(texts), "tokens": 1}},
    }
    Manifest("shards", {"command": "tokenize"}, files, totals | content).write(folder)
    return folder
