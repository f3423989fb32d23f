"""Writes `fold_table.h`: how `minhash.c` folds a letter, a digit or a mark, from Python's own Unicode database.

Run again after a change: python data_prep/native/make_fold_table.py
"""

import string
import unicodedata
from pathlib import Path

from data_prep.native.make_unicode_table import BLOCK, CODE_POINTS, array, two_stage

DROPPED = 0
SEPARATOR = ord(" ")
DIGIT = ord("0")
# What CCNet's normalization removes (Wenzek et al. 2020), and datatrove's; they leave out the opening quote ‘.
PUNCTUATION = set(string.punctuation + "«´»–—‘’“”„…∶━►、。〈〉《》「」【】！％（），．：；？［～")


def fold(code: int) -> int:
    """A code point in lower case and bare; 0 for a diacritic, " " for what separates words, "0" for a digit.

    Itself in (simple) lower case where the canonical decomposition without marks is not one code point, as Hangul's.
    """
    if 0xD800 <= code <= 0xDFFF:
        return code
    character = chr(code)
    if character.isspace() or character in PUNCTUATION or unicodedata.category(character) == "Cc":
        return SEPARATOR
    if unicodedata.category(character) == "Mn":
        return DROPPED
    if unicodedata.category(character) == "Nd":
        return DIGIT
    lower = character.lower()
    bare = [c for c in unicodedata.normalize("NFD", lower) if unicodedata.category(c) != "Mn"]
    if len(bare) == 1:
        return ord(bare[0])
    return ord(lower) if len(lower) == 1 else code


def main() -> None:
    index, blocks = two_stage([fold(code) - code for code in range(CODE_POINTS)])
    content = f"""\
/* Made by make_fold_table.py from Unicode {unicodedata.unidata_version}; do not edit. */
#ifndef FOLD_TABLE_H
#define FOLD_TABLE_H
#include <stdint.h>

{array("fold_index", "uint8_t" if max(index) < 256 else "uint16_t", index)}
{array("fold_blocks", "int32_t", blocks)}
/* A code point in lower case without diacritics; 0 for a diacritic, ' ' for what separates words, '0' for a digit. */
static inline uint32_t fold_of(uint32_t code) {{
    return code + fold_blocks[fold_index[code / {BLOCK}] * {BLOCK} + code % {BLOCK}];
}}

#endif
"""
    Path(__file__).with_name("fold_table.h").write_text(content)


if __name__ == "__main__":
    main()
