"""Encoding: the one place where text becomes token ids, and what a tokenizer folder says about itself.

The Hugging Face `tokenizers` library is the reference, `Encoder`. Others (`fast_encoders`) stand in for it where they
have been seen to give the same ids (`encoder_check`), never other ones.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep import durable
from data_prep.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_FINGERPRINTED = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    _SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; None where the tokenizer has no such token."""

    end_of_document: int
    padding: int | None
    classification: int | None
    separator: int | None
    mask: int | None
    unknown: int | None


@dataclass(frozen=True)
class TokenizerInfo:
    """What the rest of the project needs to know of a tokenizer.

    fingerprint: sha256 of its files (`tokenizer_fingerprint`), hexadecimal.
    vocab_size: largest id + 1, the rows that an embedding needs.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    special: SpecialTokens


def tokenizer_fingerprint(folder: Path | str) -> str:
    """The sha256 (hexadecimal) over the sorted names and sha256 of the tokenizer files that `folder` holds.

    `manifest.json` and files that say nothing about the ids are left out. Raises UserError as
    `load_tokenizer_info` does for a folder that is missing or has no tokenizer.json.
    """
    lines = sorted(f"{path.name} {durable.sha256_of(path)}\n" for path in tokenizer_files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_files(folder: Path | str) -> list[Path]:
    """The files that make up the tokenizer in `folder`, which may hold others, such as a model's.

    Raises UserError as `load_tokenizer_info` does for a folder that is missing or has no tokenizer.json.
    """
    folder = _checked_folder(folder)
    named = [folder / name for name in _FINGERPRINTED if (folder / name).is_file()]
    return sorted([*named, *(path for path in folder.glob("*.model") if path.is_file())])


def load_tokenizer_info(folder: Path | str) -> TokenizerInfo:
    """Reads a tokenizer folder as `save_pretrained` or `train_tokenizer` leaves it.

    The end of a document is the tokenizer's eos_token or, where it has none (BERT), its sep_token.
    Raises UserError when the folder is missing, has no tokenizer.json, when a file is damaged, or when there is no
    end-of-document token.
    """
    folder = _checked_folder(folder)
    tokenizer = _read_tokenizer(folder)
    named = _read_json(folder / _SPECIAL_TOKENS_FILE) | _read_json(folder / CONFIG_FILE)

    def id_of(role: str) -> int | None:
        entry = named.get(role)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(token, str):
            return None
        token_id: int | None = tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"{folder / CONFIG_FILE}: {role} {token!r} is not in {TOKENIZER_FILE};"
                " save the tokenizer anew with save_pretrained"
            )
        return token_id

    separator, end_of_document = id_of("sep_token"), id_of("eos_token")
    if end_of_document is None:
        end_of_document = separator
    if end_of_document is None:
        raise UserError(
            f"{folder}: no end-of-document token: expected an eos_token or a sep_token in {CONFIG_FILE};"
            ' add one, for example "eos_token": "<|endoftext|>"'
        )
    return TokenizerInfo(
        folder=folder,
        fingerprint=tokenizer_fingerprint(folder),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        special=SpecialTokens(
            end_of_document=end_of_document,
            padding=id_of("pad_token"),
            classification=id_of("cls_token"),
            separator=separator,
            mask=id_of("mask_token"),
            unknown=id_of("unk_token"),
        ),
    )


class Encoded(NamedTuple):
    """Token ids of some documents.

    ids: of all documents, one after the other [tokens], int32 or uint32.
    lengths: tokens of each document [documents], int64.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]

    def document(self, index: int) -> NDArray[Any]:
        """The ids of one document; adds up the lengths before it."""
        start = int(self.lengths[:index].sum())
        return self.ids[start : start + int(self.lengths[index])]


class FlatEncoder(Protocol):
    """What turns documents into ids: the reference, or what stands in for it.

    name, version: of the library.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        """The ids of `texts`, which are given as their UTF-8 bytes, too."""
        ...


class Encoder:
    """Whole documents to token ids, in this process and on one thread: the reference.

    Its callers run one process a core, so the first Encoder of a process sets TOKENIZERS_PARALLELISM=false, in that
    process and for its children, unless the user's environment has set it.
    """

    name = "reference"
    version = f"tokenizers {tokenizers.__version__}"

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError when `folder` is missing or holds no readable tokenizer.json."""
        # tokenizers reads the variable at every batch; as a side effect, no rayon threads are started that a
        # later fork would lose.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = _read_tokenizer(_checked_folder(folder))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The ids of each text.

        No special token is added and none is recognised: a literal "[MASK]" in a text is six characters. The
        end-of-document id is left to the caller.

        Raises ValueError naming the first text with a lone surrogate (JSON may carry "\\ud800", UTF-8 may not):
        such a text has no bytes that decoding could give back, so the caller rejects the document.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            refuse_surrogates(texts)
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        """As `encode_batch`, in one array."""
        documents = self.encode_batch(texts)
        ids = np.concatenate(documents) if documents else np.empty(0, dtype=np.int32)
        return Encoded(ids, np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)))

    def special_tokens(self) -> list[str]:
        """The special tokens, as they would look in a text."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def token_starts(self, text: str) -> NDArray[np.int64]:
        """Where in `text`, in characters, each of its tokens begins; much slower than encoding [tokens]."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; special tokens show as themselves."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def utf8(texts: list[str]) -> list[bytes]:
    """The bytes of each text; raises ValueError for a lone surrogate as `Encoder.encode_batch` does."""
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        refuse_surrogates(texts)
        raise


def refuse_surrogates(texts: list[str]) -> None:
    """Raises ValueError naming the first text with a lone surrogate, if there is one."""
    for index, text in enumerate(texts):
        if isinstance(text, str) and (found := _SURROGATE.search(text)):
            raise ValueError(
                f"text {index} of the batch holds the lone surrogate U+{ord(found[0]):04X} at character"
                f" {found.start()}, which is not Unicode text"
            ) from None


def vocabulary_of(raw: dict[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer.json's pieces, without added tokens."""
    vocabulary = raw["model"].get("vocab", {})
    return {piece: i for i, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary


def _checked_folder(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist: make it with `python -m data_prep train_tokenizer`")
    if not (folder / TOKENIZER_FILE).is_file():
        model = next(folder.glob("*.model"), None)
        raise UserError(
            f"{folder} has no {TOKENIZER_FILE}{f', only {model.name}' if model else ''}: convert it once with python -c"
            f' "from transformers import AutoTokenizer;'
            f" AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return folder


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:
        raise UserError(f"{folder / TOKENIZER_FILE} is not a readable tokenizer ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value
