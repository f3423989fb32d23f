"""Where words begin: which ids of a vocabulary begin one, told by their pieces alone.

A word is what masks take or leave as a whole (`pipeline.masking`). By kind of tokenizer:

WordPiece, and BPE that marks continuations: a piece with the mark ("##") continues a word, any other begins one.
These are the words of the tokenizer's own pre-tokenization.

Byte-level BPE and sentencepiece (BPE, unigram): the first character of the piece decides. White space begins a word,
so do punctuation, symbols and digits, and so does a letter of a script that is written without spaces (Han, Kana,
Thai and others); any other letter, an accent or a joiner continues one. So white space belongs to the word behind it,
a full stop is a word of its own, and letters straight behind a punctuation mark or a newline stay with it: "(self" is
one word, as it is where the vocabulary holds it as one piece. A piece that begins inside a character continues. One
that holds only the first bytes of a character begins a word from U+2000 on (punctuation, symbols, ideographs, emoji)
and continues one below, where the letters are.

A special or added token begins a word.
"""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import TOKENIZER_FILE, vocabulary_of
from data_prep.errors import UserError

_SPACE = "\u2581"  # sentencepiece's mark for a space
_LEAD_BYTE_OF_U2000 = 0xE2  # the bytes inside a character are below it, too
# Scripts written without spaces: Thai to Myanmar, Khmer, Han radicals, Kana, Han.
_UNSPACED = (
    (0x0E00, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x2FDF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


def word_starts(folder: Path) -> NDArray[np.bool_]:
    """Whether each id of the tokenizer in `folder` begins a word [vocab_size].

    Raises UserError for a tokenizer whose pieces do not tell.
    """
    raw = json.loads((folder / TOKENIZER_FILE).read_bytes())
    pieces = vocabulary_of(raw)
    added = {token["id"] for token in raw.get("added_tokens", ())}
    begins_word = _rule(raw, folder)
    begins = np.ones(max([*pieces.values(), *added], default=-1) + 1, dtype=bool)
    for piece, number in pieces.items():
        begins[number] = number in added or begins_word(piece)
    return begins


def special_ids(folder: Path) -> NDArray[np.int64]:
    """The special tokens of the tokenizer in `folder`, those without a role in `SpecialTokens` included [tokens]."""
    added = json.loads((folder / TOKENIZER_FILE).read_bytes()).get("added_tokens", ())
    return np.array([token["id"] for token in added if token["special"]], dtype=np.int64)


def _rule(raw: dict[str, Any], folder: Path) -> Callable[[str], bool]:
    model = raw["model"]
    if prefix := model.get("continuing_subword_prefix"):
        return lambda piece: piece == prefix or not piece.startswith(prefix)
    if not model.get("end_of_word_suffix"):
        if '"ByteLevel"' in json.dumps([raw.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]):
            byte_of = {character: bytes([byte]) for byte, character in enumerate(_byte_level_characters())}
            return lambda piece: _begins(b"".join(byte_of.get(character) or character.encode() for character in piece))
        if _SPACE in json.dumps(raw.get("decoder"), ensure_ascii=False):
            fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            return lambda piece: _begins(fallback.get(piece) or piece.replace(_SPACE, " ").encode())
    raise UserError(
        f"{folder / TOKENIZER_FILE}: the pieces of this {model['type']} do not tell where words begin, as those of"
        " WordPiece, byte-level BPE and sentencepiece do: set masking.unit to token"
    )


def _byte_level_characters() -> list[str]:
    """The character that stands for each byte: itself where it is visible in Latin-1, else the next from U+0100 on
    (Radford et al. 2019, `bytes_to_unicode` of the released encoder)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _begins(piece: bytes) -> bool:
    if not piece:
        return True
    character = piece.decode(errors="replace")[0]
    if character == "\ufffd":
        return piece[0] >= _LEAD_BYTE_OF_U2000
    category = unicodedata.category(character)
    if category == "Lo":
        return any(first <= ord(character) <= last for first, last in _UNSPACED)
    return category[0] not in "LM" and category != "Cf"
