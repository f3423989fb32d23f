"""Writes `words_table.h`: what the rules' word splitter knows by heart, after spaCy's tokenizer for English.

Contractions, abbreviations and emoticons follow spaCy 3.8, `spacy/lang/en/tokenizer_exceptions.py`,
`spacy/lang/tokenizer_exceptions.py` and `spacy/lang/char_classes.py` (MIT licence, Copyright ExplosionAI GmbH and
contributors); terminal punctuation and the punctuation of words follow datatrove's `utils/text.py` (Apache-2.0).

Run again after a change: python data_prep/native/make_words_table.py
"""

import unicodedata
from collections.abc import Iterator
from itertools import product
from pathlib import Path


def listed(words: str) -> list[str]:
    """The words of a list that is written with spaces."""
    return words.split()


EMOTICONS = listed(r"""
:) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( :-((
:((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 :() >:o :*
:-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- -__-
v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 (^_^) (-_-) (._.) (>_<)
(*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>
""")

ABBREVIATIONS = listed(r"""
' \") <space> '' C++ a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü. \t \n —
'S 's ‘S ‘s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock O'clock lovin' Lovin'
lovin Lovin havin' Havin' havin Havin Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia.
Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr.
Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. 'd a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g.
E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. p.m. Ph.D. Prof. Rep. Rev. Sen. St. vs.
v.s. 'em em 'll ll 'nuff nuff
""")

NOT_SPLIT = listed("Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore")

SYMBOLS_OF_WORDS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
TERMINAL_PUNCTUATION = (
    "᪩？⁈𑩂．꩞𑅃﹗𑂾\u1b7d፧𑅂꡶꘎⁉࠾᪨𑊩𑱂᱿𖩮᥅\U00011f43\U00011f44﹒𑈹𑈸።܂؞꛳\U00010f88𑗍𐩖𑙂\u061d꩟᠉\u1b7e𑗗᰼𑻸؟𑪜꧉𑗉𐽙𖫵𖬷܀꓿᜵𑗏𑁇𑗓𑥄៖𑥆𑗑𑗒꯫۔𐩗\U00010f86꡷\u2e54｡៕"
    "߹⸮.𑇅࠹𛲟꫰꤯𐽗᭞𑜼፨𑃁꣏𑇟𖬸𑪛𑜾࠷𝪈?𑃀𑗃！։꣎॥𑗖᭛᠃!၊𖺘⁇𑗌𑑋𖭄᭟𑅁𑙁⸼꩝𑗋。꧈꫱𑜽𐽖𑂿᙮។꛷\U00010f89៚᥄𑗕𑗎᪪᭚࠽𑇞𑗊𐽘\u2e53𑗔𖩯𑇍𑻷𐽕𑩃।𑗂𑇆𑁈။᱾𑱁꘏܁᜶‼𑈻‽᪫﹖𑑌𑈼"
    "\U00010f87𑗐៙᰻"
)
SENTENCE_ENDS = (
    "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼"
    "𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈｡。"
)
PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧"
CURRENCIES = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫€₭₮₯₰₱₲₳₴₵₶₷₸₹₺₻₼₽₾₿"
UNITS = listed(
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa"
    " mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч"
    " кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ тбكم كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ كم غرام جرام جم كغ ملغ"
    " كوب اكواب"
)

# Blocks of scripts without case, marks and punctuation included: letters of both cases for the splitter.
UNCASED = (
    (0x0591, 0x05F4), (0x0620, 0x064A), (0x066E, 0x06D5), (0x06E5, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08BD),
    (0x0900, 0x097F), (0x0980, 0x09FF), (0x0B80, 0x0BFF), (0x0C00, 0x0CFF), (0x0D80, 0x0DFF), (0x1100, 0x137F),
    (0x2E80, 0x2FDF), (0x2FF0, 0x30FF), (0x31C0, 0x31EF), (0x3200, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF),
    (0xF900, 0xFAFF), (0xFB1D, 0xFBB1), (0xFBD3, 0xFD3D), (0xFD50, 0xFDC7), (0xFDF0, 0xFDFB), (0xFE30, 0xFE4F),
    (0xFE70, 0xFEFC), (0x1EE00, 0x1EEBB), (0x1F200, 0x1F2FF), (0x20000, 0x2EBEF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def both(words: str) -> list[str]:
    return [form for word in words.split() for form in (word, word.title())]


def contractions() -> Iterator[str]:
    """Words with "|" where they are split; apostrophes are the ASCII one."""
    for orth in ("i", "I"):
        yield from (f"{orth}|'m", f"{orth}|m", f"{orth}|'m|a", f"{orth}|m|a")
    for orth in both("i you he she it we they"):
        yield from (f"{orth}|{end}" for end in ("'ll", "ll", "'ll|'ve", "ll|ve", "'d", "d", "'d|'ve", "d|ve"))
    for orth, end in product(both("i you we they"), ("'ve", "ve")):
        yield f"{orth}|{end}"
    for orth, end in product(both("you we they"), ("'re", "re")):
        yield f"{orth}|{end}"
    for orth, end in product(both("he she it"), ("'s", "s")):
        yield f"{orth}|{end}"
    for orth in both("who what when where why how there that this these those"):
        if orth.lower() not in ("these", "those"):
            yield from (f"{orth}|'s", f"{orth}|s")
        yield from (f"{orth}|{end}" for end in ("'ll", "ll", "'ll|'ve", "ll|ve", "'d", "d", "'d|'ve", "d|ve"))
        if orth.lower() not in ("that", "this"):
            yield from (f"{orth}|{end}" for end in ("'re", "re", "'ve", "ve"))
    for orth in both("ca could do does did had may might must need ought sha should wo would"):
        yield from (f"{orth}|{end}" for end in ("n't", "nt", "n't|'ve", "nt|ve"))
    for orth, end in product(both("could might must should would"), ("'ve", "ve")):
        yield f"{orth}|{end}"
    for orth, end in product(both("ai are is was were have has dare"), ("n't", "nt")):
        yield f"{orth}|{end}"
    for orth, end in product(both("doin goin nothin nuthin ol somethin"), ("", "'")):
        yield f"{orth}{end}"
    for hour, period in product(range(1, 13), ("a.m.", "am", "p.m.", "pm")):
        yield f"{hour}|{period}"
    yield from ("y'|all", "y|all", "how|'d|'y", "How|'d|'y", "not|'ve", "not|ve", "Not|'ve", "Not|ve", "can|not")
    yield from ("Can|not", "gon|na", "Gon|na", "got|ta", "Got|ta", "let|'s", "Let|'s", "c'm|on", "C'm|on")


def special_words() -> list[str]:
    """Every word of its own splitting, "\\x01" at the splits, sorted."""
    words = {word.replace("|", "\x01") for word in contractions()} | set(ABBREVIATIONS)
    words -= {word for word in words if word.replace("\x01", "") in NOT_SPLIT}
    words |= {word.replace("'", "’") for word in words} | set(EMOTICONS)
    words |= {word.replace("'", "’") for word in EMOTICONS}
    words |= {f"°\x01{unit}\x01." for unit in "cfkCFK"}
    return sorted(words)


def is_icon(code: int) -> bool:
    return unicodedata.category(chr(code)) == "So"


def ranges(codes: Iterator[int]) -> list[tuple[int, int]]:
    found: list[list[int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return [(low, high) for low, high in found]


def array(name: str, values: list[int]) -> str:
    rows = [", ".join(map(hex, values[start : start + 14])) for start in range(0, len(values), 14)]
    return f"static const uint32_t {name}[{len(values)}] = {{\n" + ",\n".join(rows) + "};\n"


def literal(text: str) -> str:
    return (
        '"'
        + "".join(
            f"\\{byte:03o}" if not 0x20 <= byte < 0x7F or byte in b'"\\?' else chr(byte) for byte in text.encode()
        )
        + '"'
    )


def points(text: str) -> list[int]:
    return sorted({ord(c) for c in text})


def main() -> None:
    controls = "".join(chr(code) for low, high in ((0, 9), (11, 13), (13, 32), (127, 160)) for code in range(low, high))
    icons = [bound for pair in ranges(code for code in range(0x80, 0x110000) if is_icon(code)) for bound in pair]
    specials = ",\n".join(literal(word) for word in special_words())
    units = ", ".join(literal(unit) for unit in dict.fromkeys(UNITS))
    content = f"""\
/* Made by make_words_table.py; do not edit. Its docstring names the sources. */
#ifndef WORDS_TABLE_H
#define WORDS_TABLE_H
#include <stdint.h>

/* Sorted code points. */
{array("word_symbols", points(SYMBOLS_OF_WORDS + TERMINAL_PUNCTUATION + controls))}
{array("terminal_punctuation", points(TERMINAL_PUNCTUATION))}
{array("sentence_ends", points(SENTENCE_ENDS))}
{array("affix_punctuation", points(PUNCTUATION + QUOTES))}
{array("quotes", points(QUOTES))}
{array("currencies", points(CURRENCIES))}
/* Symbols of category So: first and last of each range. */
{array("icons", icons)}
/* Letters of scripts without case: first and last of each range. */
{array("uncased", [bound for pair in UNCASED for bound in pair])}
static const char *const units[] = {{{units}}};
/* Words that are split in their own way, at \\001. */
static const char *const special_words[] = {{
{specials}}};

#endif
"""
    Path(__file__).with_name("words_table.h").write_text(content)


if __name__ == "__main__":
    main()
