"""The cleaning rules' parameters, and the kernel that applies them (`native/rules.c`).

docs/cleaning.md defines the rules. A parameter `min_x` drops a document for the reason `below_min_x`, a parameter
`max_x` for `above_max_x`; `none` switches a check off.
"""

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, nearest
from data_prep.native import load

LINE_REASONS = ("long_word", "no_terminal_punctuation", "few_words", "javascript", "policy", "kept")

# In the order of native/rules.c. Sources: Gopher: Rae et al. 2021, A1.1 and table A1; C4: Raffel et al. 2020, 2.2;
# FineWeb: Penedo et al. 2024, 3.5; the values are those of datatrove's filters. symbol_ratio: NeMo Curator.
DEFAULTS: dict[str, dict[str, float | None]] = {
    "length": {
        "min_characters": 1,
        "max_characters": None,
        "min_words": 50,
        "max_words": 100_000,
    },
    "symbol_ratio": {"max_symbol_ratio": 0.25},
    "gopher_repetition": {
        "max_duplicate_paragraphs": 0.30,
        "max_duplicate_paragraph_characters": 0.20,
        "max_duplicate_lines": 0.30,
        "max_duplicate_line_characters": 0.20,
        "max_top_2_gram": 0.20,
        "max_top_3_gram": 0.18,
        "max_top_4_gram": 0.16,
        "max_duplicate_5_grams": 0.15,
        "max_duplicate_6_grams": 0.14,
        "max_duplicate_7_grams": 0.13,
        "max_duplicate_8_grams": 0.12,
        "max_duplicate_9_grams": 0.11,
        "max_duplicate_10_grams": 0.10,
    },
    "gopher_quality": {
        "min_words": 50,
        "max_words": 100_000,
        "min_mean_word_length": 3,
        "max_mean_word_length": 10,
        "max_hash_ratio": 0.1,
        "max_ellipsis_ratio": 0.1,
        "max_bullet_lines": 0.9,
        "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8,
        "min_stop_words": 2,
    },
    "c4": {
        "max_word_length": 1000,
        "terminal_punctuation": 1,
        "min_words_per_line": 3,
        "lorem_ipsum": 1,
        "javascript": 1,
        "curly_bracket": 1,
        "policy": 1,
        "citations": 1,
        "min_sentences": 5,
    },
    "fineweb": {
        "min_terminal_punctuation_lines": 0.12,
        "max_short_lines": 0.67,
        "short_line_length": 30,
        "max_duplicate_line_characters": 0.01,
        "max_newlines_per_word": 0.3,
    },
}
PARAMETERS = tuple((rule, name) for rule, parameters in DEFAULTS.items() for name in parameters)


def reason_of(rule: str, parameter: str) -> str:
    """The name under which a document is counted that `parameter` of `rule` drops."""
    if parameter.startswith("min_"):
        return f"{rule}.below_{parameter}"
    if parameter.startswith("max_"):
        return f"{rule}.above_{parameter}"
    return f"{rule}.{parameter}"


REASONS = tuple(reason_of(rule, name) for rule, name in PARAMETERS)


def parameters_of(settings: Iterable[str]) -> dict[str, float | None]:
    """Every RULE.PARAMETER and its threshold (None: off), in the order of PARAMETERS.

    settings: RULE.PARAMETER=VALUE, VALUE a number or none; the last of a name counts. Raises UserError.
    """
    values = {f"{rule}.{name}": DEFAULTS[rule][name] for rule, name in PARAMETERS}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected RULE.PARAMETER=VALUE")
        if name not in values:
            raise UserError(f"--set {name}: unknown parameter; {nearest(name, values)}")
        values[name] = _number(name, value)
    return values


def _number(name: str, text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f"--set {name}={text}: expected a number, or none to switch it off")
    return value


@dataclass(frozen=True)
class Verdicts:
    """What the rules said of a batch.

    parameters: index into PARAMETERS of what dropped each document, -1 where it is kept [documents].
    values: what was measured there [documents].
    texts: the documents' texts as the rules left them; of dropped ones, as they were [documents].
    edited: how many of them have changed.
    """

    parameters: list[int]
    values: list[float]
    texts: list[str]
    edited: int


class Rules:
    """Applies rules to batches of documents; one a process and thread, for it holds scratch memory and a cache."""

    def __init__(self, rules: Sequence[str], thresholds: Sequence[float | None]) -> None:
        """rules: keys of DEFAULTS, in the order of application. thresholds: in that of PARAMETERS, None for off."""
        self._library = _library()
        self._state = self._library.rules_new()
        if not self._state:
            raise MemoryError
        self._order = np.array([list(DEFAULTS).index(rule) for rule in rules], np.int32)
        self._values = np.array([math.nan if value is None else value for value in thresholds], np.float64)
        self._padding = bytes(self._library.rules_padding())
        self._lines: npt.NDArray[np.int64] = np.zeros(len(LINE_REASONS), np.int64)

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.rules_free(self._state)

    @property
    def lines(self) -> dict[str, int]:
        """Lines of C4's documents so far: how many each of its line rules removed, and how many it kept."""
        return dict(zip(LINE_REASONS, self._lines.tolist(), strict=True))

    def __call__(self, texts: Sequence[str]) -> Verdicts:
        """Applies the rules in their order to each of `texts`."""
        encoded = [text.encode() for text in texts]
        count = len(encoded)
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        buffer = b"".join((*encoded, self._padding))
        del encoded  # a document may be large
        reasons, values = np.empty(count, np.int32), np.empty(count, np.float64)
        edited = np.empty(count, np.uint8)
        output, output_offsets = np.empty(len(buffer), np.uint8), np.empty(count + 1, np.int64)
        status = self._library.rules_apply(
            self._state,
            buffer,
            _address(offsets),
            count,
            _address(self._order),
            len(self._order),
            _address(self._values),
            _address(reasons),
            _address(values),
            _address(edited),
            _address(output),
            _address(output_offsets),
            _address(self._lines),
        )
        if status:
            raise MemoryError
        left = list(texts)
        changed = np.flatnonzero(edited).tolist()
        for index in changed:
            left[index] = output[output_offsets[index] : output_offsets[index + 1]].tobytes().decode()
        return Verdicts((reasons - 1).tolist(), values.tolist(), left, len(changed))

    def word_lengths(self, text: str) -> list[int]:
        """The lengths in characters of the words that the rules see in `text`."""
        encoded = text.encode()
        lengths = np.empty(len(encoded) + 1, np.uint32)
        count = self._library.rules_words(
            self._state, encoded + self._padding, len(encoded), _address(lengths), len(lengths)
        )
        if count < 0:
            raise MemoryError
        return [int(length) for length in lengths[:count]]


def kernel_parameters() -> list[str]:
    """RULE.PARAMETER of every parameter as the kernel has them."""
    return str(_library().rules_parameters().decode()).split()


def _address(array: npt.NDArray[np.generic]) -> int:
    return array.ctypes.data


def _library() -> ctypes.CDLL:
    library = load("rules")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.rules_new.restype = pointer
    library.rules_free.argtypes = [pointer]
    library.rules_padding.restype = integer
    library.rules_parameters.restype = ctypes.c_char_p
    library.rules_words.argtypes = [pointer, ctypes.c_char_p, integer, pointer, integer]
    library.rules_words.restype = integer
    library.rules_apply.argtypes = [
        pointer, ctypes.c_char_p, pointer, integer, pointer, ctypes.c_int32, *[pointer] * 7
    ]  # fmt: skip
    return library
