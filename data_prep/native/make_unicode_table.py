"""Writes `unicode_table.h`, the character classes that the C kernels share, from Python's own Unicode database.

Run again after a change: python data_prep/native/make_unicode_table.py
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path

BLOCK = 128
CODE_POINTS = 0x110000
CLASSES: dict[str, Callable[[str], bool]] = {
    "SPACE": str.isspace,
    "ALPHA": str.isalpha,
    "ALNUM": str.isalnum,
    "PUNCTUATION": lambda c: unicodedata.category(c).startswith("P"),
    "SYMBOL": lambda c: unicodedata.category(c).startswith("S"),
    "UPPER": lambda c: c.isupper() or c.istitle(),
    "MARK": lambda c: unicodedata.category(c).startswith("M"),
    # Scripts written without spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar, Tibetan).
    "UNSPACED": lambda c: any(
        low <= ord(c) <= high
        for low, high in (
            (0x0E00, 0x0EFF),
            (0x0F00, 0x0FFF),
            (0x1000, 0x109F),
            (0x1780, 0x17FF),
            (0x2E80, 0x2FDF),
            (0x3040, 0x30FF),
            (0x3400, 0x4DBF),
            (0x4E00, 0x9FFF),
            (0xF900, 0xFAFF),
            (0x20000, 0x323AF),
        )
    ),
}


def lowercase(code: int) -> int:
    """The simple (one to one) lower case of a code point; itself where lower() gives several."""
    lower = chr(code).lower()
    return ord(lower) if len(lower) == 1 else code


def two_stage(values: list[int]) -> tuple[list[int], list[int]]:
    """(index of each block, the distinct blocks one after the other)."""
    blocks: dict[tuple[int, ...], int] = {}
    index = []
    for start in range(0, CODE_POINTS, BLOCK):
        block = tuple(values[start : start + BLOCK])
        index.append(blocks.setdefault(block, len(blocks)))
    return index, [value for block in blocks for value in block]


def array(name: str, kind: str, values: list[int]) -> str:
    rows = [", ".join(map(str, values[start : start + 24])) for start in range(0, len(values), 24)]
    return f"static const {kind} {name}[{len(values)}] = {{\n" + ",\n".join(rows) + "};\n"


def main() -> None:
    points = [chr(code) for code in range(CODE_POINTS)]
    classes = [sum(bool(test(c)) << bit for bit, test in enumerate(CLASSES.values())) for c in points]
    deltas = [lowercase(code) - code for code in range(CODE_POINTS)]
    class_index, class_blocks = two_stage(classes)
    lower_index, lower_blocks = two_stage(deltas)
    names = "\n".join(f"#define CLASS_{name} {1 << bit}" for bit, name in enumerate(CLASSES))
    content = f"""\
/* Made by make_unicode_table.py from Unicode {unicodedata.unidata_version}; do not edit. */
#ifndef UNICODE_TABLE_H
#define UNICODE_TABLE_H
#include <stdint.h>

{names}

{array("unicode_class_index", "uint8_t" if max(class_index) < 256 else "uint16_t", class_index)}
{array("unicode_class_blocks", "uint8_t", class_blocks)}
{array("unicode_lower_index", "uint8_t" if max(lower_index) < 256 else "uint16_t", lower_index)}
{array("unicode_lower_blocks", "int32_t", lower_blocks)}
static inline uint8_t class_of(uint32_t code) {{
    return unicode_class_blocks[unicode_class_index[code / {BLOCK}] * {BLOCK} + code % {BLOCK}];
}}

static inline uint32_t lower_of(uint32_t code) {{
    return code + unicode_lower_blocks[unicode_lower_index[code / {BLOCK}] * {BLOCK} + code % {BLOCK}];
}}

/* The code point at `text` (valid UTF-8); `*length` gets its bytes. */
static inline uint32_t code_point(const uint8_t *text, int *length) {{
    uint8_t first = text[0];
    if (first < 0x80) {{
        *length = 1;
        return first;
    }}
    if (first < 0xE0) {{
        *length = 2;
        return (first & 0x1Fu) << 6 | (text[1] & 0x3Fu);
    }}
    if (first < 0xF0) {{
        *length = 3;
        return (first & 0x0Fu) << 12 | (text[1] & 0x3Fu) << 6 | (text[2] & 0x3Fu);
    }}
    *length = 4;
    return (first & 0x07u) << 18 | (text[1] & 0x3Fu) << 12 | (text[2] & 0x3Fu) << 6 | (text[3] & 0x3Fu);
}}

#endif
"""
    Path(__file__).with_name("unicode_table.h").write_text(content)


if __name__ == "__main__":
    main()
