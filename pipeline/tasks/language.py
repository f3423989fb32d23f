"""What a pretrained model knows without fine-tuning: perplexity of held-out text, LAMBADA, minimal pairs.

A causal model reads a text behind the end of a document, as in training (pipeline.likelihood).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.plan import split_documents
from data_prep.shards import ShardSet
from pipeline.likelihood import Done, pseudo_log_likelihood, token_log_probabilities

if TYPE_CHECKING:
    from pipeline.exported import Exported

Bar = Callable[[int], Done]
"""Makes, of a number of tokens, what is called with the tokens that are done."""
_LARGEST = 700.0  # the exponent of the largest perplexity that a float holds


@dataclass(frozen=True)
class Found:
    """metrics by name; parts: the same of each part of the input that a benchmark names."""

    metrics: dict[str, float]
    parts: dict[str, dict[str, float]]


def exponential(nats: float) -> float:
    return math.exp(min(nats, _LARGEST))


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl file with "text", or a file's whole text as one; raises UserError for another."""
    if path.suffix == ".jsonl":
        return [row["text"] for row in read_objects(path, ("text",))]
    try:
        return [path.read_bytes().decode()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}; expected UTF-8") from None


def read_objects(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; raises UserError naming a line that is none, or in which one of `texts` is none."""
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in texts):
                raise UserError(f"{path}, line {number}: expected an object with {', '.join(texts)}")
            found.append(row)
    if not found:
        raise UserError(f"{path} is empty")
    return found


def held_out_documents(
    folder: Path, exported: "Exported", validation_fraction: float
) -> Iterator[NDArray[np.integer[Any]]]:
    """The ids of the documents that training with this fraction holds out, ends of documents included.

    Raises UserError for shards of another tokenizer, or where nothing is held out.
    """
    shards = ShardSet.open(folder)
    info = exported.tokenizer
    # An exported BERT's tokenizer has its frame added, so its files are others than the shards'.
    if exported.objective == "causal" and shards.tokenizer_fingerprint not in (None, info.fingerprint):
        raise UserError(
            f"--input {folder}: its shards were made with tokenizer {str(shards.tokenizer_fingerprint)[:12]}, the model"
            f" has {info.fingerprint[:12]}; give the text instead"
        )
    if shards.vocab_size is not None and shards.vocab_size != info.vocab_size:
        raise UserError(
            f"--input {folder}: its shards have a vocabulary of {shards.vocab_size}, the model one of"
            f" {info.vocab_size}; give the text instead"
        )
    _, split = split_documents(shards, validation_fraction)
    if not sum(split.tokens):
        raise UserError(f"--input {folder}: --validation_fraction {validation_fraction} holds out no document")
    for index in range(len(shards.names)):
        shard = shards.shard(index)
        for document in range(split.first_document[index], split.end_document[index]):
            yield np.array(shard.document(document))


def perplexity(
    exported: "Exported", documents: Sequence[NDArray[np.integer[Any]]], bar: Bar, stride: int | None = None
) -> Found:
    """perplexity: exp of the mean nats a token; bits_per_byte: of the UTF-8 bytes that the ids stand for. Of a masked
    LM both are pseudo-perplexities (Salazar et al. 2020, section 3.3), one forward pass a token."""
    special = exported.tokenizer.special
    if exported.objective == "mlm":
        documents = [ids[ids != special.end_of_document] for ids in documents]
    nats, tokens = _nats(exported, documents, bar, stride)
    texts = (ids[ids != special.end_of_document] for ids in documents)
    size = sum(len(exported.encoder.decode(ids).encode()) for ids in texts)
    return Found(
        {
            "loss": nats / tokens,
            "perplexity": exponential(nats / tokens),
            "bits_per_byte": nats / math.log(2) / max(1, size),
            "tokens": tokens,
            "documents": len(documents),
        },
        {},
    )


def _nats(
    exported: "Exported", sequences: Sequence[NDArray[np.integer[Any]]], bar: Bar, stride: int | None = None
) -> tuple[float, int]:
    """Nats and tokens of all sequences together."""
    scores = log_probabilities(exported, sequences, bar, stride)
    tokens = sum(map(len, scores))
    if not tokens:
        raise UserError("--input has no tokens")
    return -float(sum(found.sum() for found in scores)), tokens


def log_probabilities(
    exported: "Exported", sequences: Sequence[NDArray[np.integer[Any]]], bar: Bar, stride: int | None = None
) -> list[NDArray[np.float64]]:
    """Of each token of each sequence, in nats: by a causal model given those before, by a masked one given all
    others."""
    done = bar(sum(map(len, sequences)))
    if exported.objective == "mlm":
        return pseudo_log_likelihood(exported.model, sequences, exported.tokenizer.special, done=done)
    start = exported.tokenizer.special.end_of_document
    found = token_log_probabilities(exported.model, sequences, start, stride=stride, done=done)
    return [scores.log_probabilities for scores in found]


_JOINED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"))
_TIDIED = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_ENCLOSED = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))


def detokenize_wikitext(text: str) -> str:
    """WikiText's tokenised text as prose, by the rules that GPT-2's zero-shot results began with (Radford et al. 2019,
    section 3.1), as Megatron-LM and lm-eval have them."""
    text = text.replace("s '", "s'")
    for found, wanted in _JOINED:
        text = text.replace(found, wanted)
    for left, right in _ENCLOSED:
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        text = re.sub(inside, rf"{left}\1{right}", text)
    for found, wanted in _TIDIED:
        text = text.replace(found, wanted)
    return text


def word_perplexity(
    exported: "Exported", texts: Sequence[str], bar: Bar, stride: int | None = None, *, detokenize: bool = True
) -> Found:
    """word_perplexity: exp of the texts' nats over the number of their words as the file has them, separated by white
    space, so that tokenizers compare; their text is detokenised first. bits_per_byte: of the file's bytes. Windows
    begin `stride` tokens apart (pipeline.likelihood.windows)."""
    read = [detokenize_wikitext(text) if detokenize else text for text in texts]
    nats, tokens = _nats(exported, encode(exported, read), bar, stride)
    words = sum(len(text.split()) for text in texts)
    return Found(
        {
            "word_perplexity": exponential(nats / max(1, words)),
            "token_perplexity": exponential(nats / tokens),
            "bits_per_byte": nats / math.log(2) / max(1, sum(len(text.encode()) for text in texts)),
            "words": words,
            "tokens": tokens,
        },
        {},
    )


def encode(exported: "Exported", texts: Sequence[str]) -> list[NDArray[np.int64]]:
    return [ids.astype(np.int64) for ids in exported.encoder.encode_batch(list(texts))]


def lambada(exported: "Exported", texts: Sequence[str], bar: Bar) -> Found:
    """The last word of each text given what stands before it (Paperno et al. 2016). accuracy: share of the words whose
    tokens are each the model's first choice; perplexity: exp of the mean nats a word, as lm-eval has it."""
    for text in texts:
        if " " not in text.strip():
            raise UserError(f"--input: {text!r} has a single word; LAMBADA's texts end with the word that is asked for")
    texts = [text.strip() for text in texts]
    sequences = encode(exported, texts)
    contexts = encode(exported, [text.rpartition(" ")[0] for text in texts])
    start = exported.tokenizer.special.end_of_document
    done = bar(sum(map(len, sequences)))
    found = token_log_probabilities(exported.model, sequences, start, done=done)
    right, nats = 0, 0.0
    for scores, context in zip(found, contexts, strict=True):
        right += bool((scores.ranks[len(context) :] == 0).all())
        nats -= float(scores.log_probabilities[len(context) :].sum())
    return Found(
        {"accuracy": right / len(texts), "perplexity": exponential(nats / len(texts)), "texts": len(texts)}, {}
    )


def minimal_pairs(exported: "Exported", pairs: Sequence[dict[str, Any]], bar: Bar) -> Found:
    """accuracy: share of the pairs whose sentence_good the model finds likelier than sentence_bad (Warstadt et al.
    2020, BLiMP, section 4), by the sum over the tokens' log-probabilities, which of a masked LM is the
    pseudo-log-likelihood (Salazar et al. 2020, section 4.1). Ties count as wrong. parts: by UID, where there are any.
    """
    sentences = [pair[name] for pair in pairs for name in ("sentence_good", "sentence_bad")]
    sums = [float(scores.sum()) for scores in log_probabilities(exported, encode(exported, sentences), bar)]
    right = [good > bad for good, bad in zip(sums[::2], sums[1::2], strict=True)]
    by_part: dict[str, list[bool]] = {}
    for pair, is_right in zip(pairs, right, strict=True):
        if isinstance(pair.get("UID"), str):
            by_part.setdefault(pair["UID"], []).append(is_right)
    parts = {name: {"accuracy": sum(found) / len(found), "pairs": len(found)} for name, found in by_part.items()}
    return Found({"accuracy": sum(right) / len(right), "pairs": len(right)}, parts)
