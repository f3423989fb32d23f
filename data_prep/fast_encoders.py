"""Encoders that are faster than the reference: gigatoken for BPE, tokie for WordPiece, sentencepiece for unigram.

Each is made so that it should give the reference's ids: no special token is recognised in text. Whether it does is
for `encoder_check` to see; what cannot be loaded or is of another kind is simply not used.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import TOKENIZER_FILE, Encoded, Encoder, FlatEncoder

_SPACE = "\u2581"  # sentencepiece's mark for a space
# sentencepiece adds scores in float32, exact for our trained ones (multiples of 1/64) up to 2^24 / 64 nats, the cost
# of about 100 kB of text (`train_tokenizer`); and its time a byte grows with the length of a text.
_MAX_PIECE_BYTES = 64_000
_UNTRIED = 2


class Gigatoken:
    """BPE, byte-level or of sentencepiece's kind."""

    name = "gigatoken"

    def __init__(self, folder: Path) -> None:
        """Raises whatever gigatoken raises for a tokenizer that it does not take."""
        import gigatoken

        self.version = importlib.metadata.version("gigatoken")
        raw = _without_special_tokens(folder)
        if raw["model"]["type"] != "BPE":
            raise ValueError(f"a {raw['model']['type']}, not a BPE")
        if _is_cut_at_spaces(raw):
            # Our own sentencepiece-like BPE is cut before runs of spaces, which no piece crosses: the ids are
            # those of the uncut text, the only ones that gigatoken knows.
            raw["pre_tokenizer"] = None
        self._backend = gigatoken.Tokenizer.from_json(json.dumps(raw)).backend

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        if not texts:
            return _nothing()
        layout = self._backend.encode_batch(encoded, parallel=False).layout  # an awkward ListOffsetArray
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)
        return Encoded(ids[offsets[0] : offsets[-1]], np.diff(offsets))


class Tokie:
    """WordPiece (and unigram, where there is no sentencepiece model)."""

    name = "tokie"

    def __init__(self, folder: Path) -> None:
        """Raises whatever tokie raises for a tokenizer that it does not take."""
        import tokie

        self.version = importlib.metadata.version("tokie")
        raw = _without_special_tokens(folder)
        if raw["model"]["type"] not in ("WordPiece", "Unigram"):
            raise ValueError(f"a {raw['model']['type']}, not a WordPiece or unigram")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / TOKENIZER_FILE
            path.write_text(json.dumps(raw))
            self._tokenizer: Any = tokie.Tokenizer.from_json(str(path))

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        if not texts:
            return _nothing()
        with _on_this_core():
            ids, lengths = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False)
        return Encoded(ids, lengths.astype(np.int64))


@contextlib.contextmanager
def _on_this_core() -> Iterator[None]:
    """Keeps this thread on the core that it is at.

    tokie starts a thread for each core that the calling thread may use, at every call, and has no setting for it; we
    run a process a core.
    """
    try:
        allowed, core = os.sched_getaffinity(0), ctypes.CDLL(None).sched_getcpu()
        os.sched_setaffinity(0, {core})
    except (AttributeError, OSError):  # not on this system
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Sentencepiece:
    """sentencepiece's own C++ encoder of the folder's `*.model`."""

    name = "sentencepiece"

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when `folder` holds no model, and whatever sentencepiece raises."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        self.version = importlib.metadata.version("sentencepiece")
        model = next(iter(sorted(folder.glob("*.model"))), None)
        if model is None:
            raise ValueError("no *.model")
        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
        proto.ParseFromString(model.read_bytes())
        normalizer = proto.normalizer_spec
        # A cut before a space changes nothing where no piece crosses it and the text is taken as it is.
        self._cuts = (
            not normalizer.precompiled_charsmap
            and not normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces
            and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in proto.pieces)
        )
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        pieces = texts
        counts: list[int] | None = None
        if self._cuts and max(map(len, encoded), default=0) > _MAX_PIECE_BYTES:
            cut = [
                _cut(text) if len(raw) > _MAX_PIECE_BYTES else [text] for text, raw in zip(texts, encoded, strict=True)
            ]
            counts = [len(parts) for parts in cut]
            pieces = list(itertools.chain.from_iterable(cut))
        lists: list[list[int]] = self._processor.encode(pieces, num_threads=1)
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        ids = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum()))
        if counts is not None:
            lengths = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
        return Encoded(ids, lengths)


def _cut(text: str) -> list[str]:
    """Pieces of `text` of at most 64,000 bytes, each but the first beginning with the space after a non-space.

    One without such a place stays as long as it is.
    """
    pieces = []
    start = 0
    step = _MAX_PIECE_BYTES // 4  # UTF-8 takes at most 4 bytes a character
    if text.isascii():
        step = _MAX_PIECE_BYTES
    while len(text) - start > step:
        end = start + step
        while (cut := text.rfind(" ", start + 1, end)) > 0 and text[cut - 1] in (" ", _SPACE):
            end = cut
        if cut <= start:
            cut = start + step
            while (cut := text.find(" ", cut)) > 0 and text[cut - 1] in (" ", _SPACE):
                cut += 1
            if cut < 0:
                break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


class GuardedTokie:
    """tokie, but for documents that hold a character on which it differs from the reference.

    The two know different versions of Unicode, so what is a letter, a mark or unassigned differs for some characters
    that are rare in text (and for U+007F). Every character is tried with both when it is first met; a document that
    holds one that differs is left to the reference, the tokenizer of the folder itself.
    """

    name = Tokie.name

    def __init__(self, folder: Path) -> None:
        self._fast, self._reference = Tokie(folder), Encoder(folder)
        self.version = self._fast.version
        self.reference_documents = 0
        self._hard = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
        self._hard[:] = _UNTRIED
        self._try(np.arange(128))
        hard_ascii = bytes(np.flatnonzero(self._hard[:128]).astype(np.uint8))
        self._hard_ascii = re.compile(b"[" + re.escape(hard_ascii) + b"]") if hard_ascii else None

    def encode_flat(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        hard = [i for i, (text, raw) in enumerate(zip(texts, encoded, strict=True)) if self._is_hard(text, raw)]
        if not hard:
            return self._fast.encode_flat(texts, encoded)
        self.reference_documents += len(hard)
        kept = sorted(set(range(len(texts))) - set(hard))
        encodings = [
            (kept, self._fast.encode_flat([texts[i] for i in kept], [encoded[i] for i in kept])),
            (hard, self._reference.encode_flat([texts[i] for i in hard], [encoded[i] for i in hard])),
        ]
        documents = [np.empty(0, dtype=np.uint32)] * len(texts)
        for numbers, encoding in encodings:
            for number, ids in zip(
                numbers, np.split(encoding.ids, np.cumsum(encoding.lengths)[:-1]), strict=bool(numbers)
            ):
                documents[number] = ids.astype(np.uint32, copy=False)
        return Encoded(np.concatenate(documents), np.array([len(ids) for ids in documents], dtype=np.int64))

    def _is_hard(self, text: str, raw: bytes) -> bool:
        if len(text) == len(raw):  # ASCII
            return self._hard_ascii is not None and self._hard_ascii.search(raw) is not None
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        found = self._hard[codes]
        if not found.any():
            return False
        untried = codes[found == _UNTRIED]
        if len(untried):
            self._try(np.unique(untried))
            found = self._hard[codes]
        return bool(found.any())

    def _try(self, codes: NDArray[Any]) -> None:
        """Notes for each character whether the two encoders differ on it: alone, doubled and among letters."""
        texts = [f"a{chr(code)}b {chr(code)} {chr(code)}{chr(code)}" for code in codes]
        raw = [text.encode() for text in texts]
        ours, theirs = self._fast.encode_flat(texts, raw), self._reference.encode_flat(texts, raw)
        cuts = np.cumsum(ours.lengths)[:-1], np.cumsum(theirs.lengths)[:-1]
        pairs = zip(np.split(ours.ids, cuts[0]), np.split(theirs.ids, cuts[1]), strict=True)
        self._hard[codes] = [not np.array_equal(mine, its) for mine, its in pairs]


FAST_ENCODERS: dict[str, Callable[[Path], FlatEncoder]] = {
    Gigatoken.name: Gigatoken,
    Sentencepiece.name: Sentencepiece,
    GuardedTokie.name: GuardedTokie,
}


def fast_encoder_for(folder: Path) -> str | None:
    """The name of the encoder that may stand in for the tokenizer in `folder`, if it is installed."""
    model = json.loads((folder / TOKENIZER_FILE).read_bytes())["model"].get("type")
    name = {
        "BPE": Gigatoken.name,
        "WordPiece": GuardedTokie.name,
        "Unigram": Sentencepiece.name if any(folder.glob("*.model")) else GuardedTokie.name,
    }.get(model)
    return name if name and importlib.util.find_spec(name) else None


@functools.lru_cache(maxsize=4)
def load_encoder(name: str, folder: Path, fingerprint: str) -> FlatEncoder:
    """The encoder `name`, or the reference, of the tokenizer with this fingerprint.

    Kept for the process's next part: loading takes a part's tenth, and a warm cache of words is worth as much. Raises
    whatever the library raises.
    """
    return Encoder(folder) if name == Encoder.name else FAST_ENCODERS[name](folder)


def _without_special_tokens(folder: Path) -> dict[str, Any]:
    """The tokenizer.json without what makes special tokens of text; they stay in the vocabulary."""
    raw: dict[str, Any] = json.loads((folder / TOKENIZER_FILE).read_bytes())
    raw["added_tokens"] = [token for token in raw.get("added_tokens", ()) if not token["special"]]
    raw["truncation"] = raw["padding"] = raw["post_processor"] = None
    return raw


def _is_cut_at_spaces(raw: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer is `train_tokenizer`'s, and no piece has a space behind another character."""
    pre_tokenizer = raw.get("pre_tokenizer") or {}
    return (
        pre_tokenizer.get("type") == "Split"
        and pre_tokenizer.get("pattern") == {"Regex": f"{_SPACE}+"}
        and pre_tokenizer.get("behavior") == "MergedWithNext"
        and not any(_SPACE in piece.lstrip(_SPACE) for piece in raw["model"]["vocab"])
    )


def _nothing() -> Encoded:
    return Encoded(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
