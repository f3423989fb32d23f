/* Where sentences begin in UTF-8 text, which tokens begin there, and the ends of documents put between ids.
 *
 * The rule is told in data_prep/sentences.py. Texts are valid UTF-8, documents one after the other: document d is
 * text[offsets[d] .. offsets[d + 1]). Nothing outside is read.
 */
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "unicode_table.h"

enum { ORDINARY, NEWLINE, STOP, MAYBE }; /* ORDINARY is 0 */

/* What may matter at a byte: a newline, an ASCII full stop, or the first byte of a terminator beyond ASCII. */
static const uint8_t interest[256] = {['\n'] = NEWLINE, ['.'] = STOP,  ['!'] = STOP,  ['?'] = STOP,
                                      [0xD8] = MAYBE,   [0xDB] = MAYBE, [0xE0] = MAYBE, [0xE2] = MAYBE,
                                      [0xE3] = MAYBE,   [0xEF] = MAYBE};

/* Bytes that neither end nor close a sentence, nor are white space: letters, digits, some signs. */
static const uint8_t quick[256] = {
    ['a'] = 1, ['b'] = 1, ['c'] = 1, ['d'] = 1, ['e'] = 1, ['f'] = 1, ['g'] = 1, ['h'] = 1, ['i'] = 1, ['j'] = 1,
    ['k'] = 1, ['l'] = 1, ['m'] = 1, ['n'] = 1, ['o'] = 1, ['p'] = 1, ['q'] = 1, ['r'] = 1, ['s'] = 1, ['t'] = 1,
    ['u'] = 1, ['v'] = 1, ['w'] = 1, ['x'] = 1, ['y'] = 1, ['z'] = 1, ['A'] = 1, ['B'] = 1, ['C'] = 1, ['D'] = 1,
    ['E'] = 1, ['F'] = 1, ['G'] = 1, ['H'] = 1, ['I'] = 1, ['J'] = 1, ['K'] = 1, ['L'] = 1, ['M'] = 1, ['N'] = 1,
    ['O'] = 1, ['P'] = 1, ['Q'] = 1, ['R'] = 1, ['S'] = 1, ['T'] = 1, ['U'] = 1, ['V'] = 1, ['W'] = 1, ['X'] = 1,
    ['Y'] = 1, ['Z'] = 1, ['0'] = 1, ['1'] = 1, ['2'] = 1, ['3'] = 1, ['4'] = 1, ['5'] = 1, ['6'] = 1, ['7'] = 1,
    ['8'] = 1, ['9'] = 1, ['-'] = 1, ['*'] = 1, ['/'] = 1, ['#'] = 1, ['('] = 1, ['<'] = 1, ['='] = 1, ['_'] = 1};

/* 1: a terminator that white space must follow; 2: one that needs none. */
static int terminator(uint32_t code) {
    switch (code) {
    case '.': case '!': case '?': case 0x2026: /* ellipsis */
    case 0x061F: case 0x06D4: /* Arabic question mark and full stop */
    case 0x0964: /* danda */
        return 1;
    case 0x3002: case 0xFF01: case 0xFF0E: case 0xFF1F: case 0xFF61: /* ideographic and full-width */
        return 2;
    default:
        return 0;
    }
}

static int closes(uint32_t code) {
    switch (code) {
    case '"': case '\'': case ')': case ']': case '}': case 0xBB: case 0x2019: case 0x201D: case 0x203A:
    case 0x3009: case 0x300B: case 0x300D: case 0x300F: case 0x3011: case 0xFF09: case 0xFF63:
        return 1;
    default:
        return 0;
    }
}

/* Lower case in a script that has it: Latin, Greek, Cyrillic, Armenian. */
static int is_lower(uint32_t code) {
    if (code < 0x80) return code >= 'a' && code <= 'z';
    if (code >= 0x0590 && !(code >= 0x1E00 && code < 0x2000)) return 0;
    uint8_t class = class_of(code);
    return (class & CLASS_ALPHA) && !(class & CLASS_UPPER);
}

static int is_space(const uint8_t *text, int64_t at, int *length) {
    if (text[at] < 0x80) {
        *length = 1;
        return text[at] == ' ' || (text[at] >= '\t' && text[at] <= '\r') || (text[at] >= 0x1C && text[at] <= 0x1F);
    }
    return class_of(code_point(text + at, length)) & CLASS_SPACE;
}

static int is_letter(uint8_t byte) { return (byte | 0x20) >= 'a' && (byte | 0x20) <= 'z'; }
static int is_digit(uint8_t byte) { return byte >= '0' && byte <= '9'; }

static const char *const before_names[] = {"adm", "capt", "cf",  "cmdr", "col", "dr",   "eg",  "e.g", "gen", "gov",
                                           "hon", "i.e",  "ie",  "lt",   "maj", "messrs", "mlle", "mme", "mr",  "mrs",
                                           "ms",  "mt",   "pres", "prof", "rep", "rev",  "sen", "sgt", "st",  "vs",
                                           "viz", "approx", "dept", "univ"};
static const char *const before_numbers[] = {"art", "ch", "eq", "eqs", "fig", "figs", "no",  "nos", "p",
                                             "para", "pp", "sec", "sect", "tab", "vol", "vols", "ver", "v",
                                             "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept",
                                             "oct", "nov", "dec"};

static int listed(const uint8_t *word, int64_t length, const char *const *list, int count) {
    char lower[8];
    if (length > 6) return 0;
    for (int64_t i = 0; i < length; i++) lower[i] = (char)(word[i] | (is_letter(word[i]) ? 0x20 : 0));
    lower[length] = 0;
    for (int i = 0; i < count; i++)
        if (!strcmp(lower, list[i])) return 1;
    return 0;
}

#define COUNT(list) ((int)(sizeof(list) / sizeof((list)[0])))

/* Whether the one full stop at `stop` ends an abbreviation, an initial or the number of a list's item; `next` is what
 * comes after the white space. */
static int abbreviates(const uint8_t *text, int64_t start, int64_t stop, uint32_t next) {
    int64_t from = stop;
    while (from > start && stop - from < 8 && (is_letter(text[from - 1]) || (text[from - 1] == '.' && from < stop)))
        from--;
    while (from < stop && text[from] == '.') from++;
    int64_t length = stop - from;
    if (from > start && (text[from - 1] >= 0x80 || is_digit(text[from - 1]) || text[from - 1] == '_')) length = 0;
    if (length == 1 && text[from] >= 'A' && text[from] <= 'Z' && text[from] != 'I') return 1; /* an initial */
    if (length && listed(text + from, length, before_names, COUNT(before_names))) return 1;
    if (length && next < 0x80 && is_digit((uint8_t)next) &&
        listed(text + from, length, before_numbers, COUNT(before_numbers)))
        return 1;
    if (stop > start && is_digit(text[stop - 1])) { /* "12. Title" at the beginning of a line */
        int64_t digit = stop;
        while (digit > start && stop - digit < 4 && is_digit(text[digit - 1])) digit--;
        int64_t before = digit;
        while (before > start && (text[before - 1] == ' ' || text[before - 1] == '\t')) before--;
        if (before == start || text[before - 1] == '\n') return 1;
    }
    return 0;
}

#define EACH(byte) (0x0101010101010101ull * (byte))

/* The next place from `at` on that may matter (`interest`), or `size`: 16 bytes at a time where there is SSE2 (every
 * x86-64), then, or otherwise, eight. */
static int64_t next_interest(const uint8_t *text, int64_t at, int64_t size) {
#ifdef __SSE2__
    for (; at + 16 <= size; at += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(text + at));
        __m128i ends = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\n')), _mm_cmpeq_epi8(bytes, _mm_set1_epi8('.')));
        __m128i marks = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('!')), _mm_cmpeq_epi8(bytes, _mm_set1_epi8('?')));
        /* The top bits of `bytes` itself are those of the characters beyond ASCII. */
        unsigned found = (unsigned)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(ends, marks), bytes));
        for (; found; found &= found - 1) {
            int64_t place = at + __builtin_ctz(found);
            if (interest[text[place]]) return place;
        }
    }
#endif
    while (at + 8 <= size) {
        uint64_t word, high, low, found = 0;
        memcpy(&word, text + at, 8);
        high = word & EACH(0x80);
        low = word & EACH(0x7F);
        /* A byte of `low` equals the wanted one where the sum does not reach its top bit: exact, nothing carries. */
        found |= ~((low ^ EACH('\n')) + EACH(0x7F));
        found |= ~((low ^ EACH('.')) + EACH(0x7F));
        found |= ~((low ^ EACH('!')) + EACH(0x7F));
        found |= ~((low ^ EACH('?')) + EACH(0x7F));
        found = (found & EACH(0x80)) | high;
#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        for (; found; found &= found - 1) {
            int64_t place = at + __builtin_ctzll(found) / 8;
            if (interest[text[place]]) return place;
        }
        at += 8;
#else
        if (!found) {
            at += 8;
            continue;
        }
        for (int64_t end = at + 8; at < end; at++)
            if (interest[text[at]]) return at;
#endif
    }
    while (at < size && !interest[text[at]]) at++;
    return at;
}

/* Sentences of one document: where each but the first begins, in bytes from its start. Returns how many. */
static int64_t starts_of(const uint8_t *text, int64_t size, int32_t *starts) {
    int64_t found = 0, at = 0, begin = 0;
    int length;
    while (at < size && is_space(text, at, &length)) at += length;
    begin = at;
    while ((at = next_interest(text, at, size)) < size) {
        uint8_t kind = interest[text[at]];
        int64_t cut = -1, after = at;
        if (at + 1 < size && quick[text[at + 1]] && (kind == NEWLINE || kind == STOP)) {
            at += 2; /* a new line of text, or the point of "3.14": the byte behind it matters to nothing */
            continue;
        }
        if (kind == NEWLINE) {
            int newlines = 0;
            while (after < size && is_space(text, after, &length)) {
                newlines += text[after] == '\n';
                after += length;
            }
            if (newlines > 1) cut = at;
        } else {
            int strength = terminator(code_point(text + at, &length)), stops = 0;
            if (!strength) {
                at += length;
                continue;
            }
            int64_t last = at;
            while (after < size) {
                int other = terminator(code_point(text + after, &length));
                if (!other) break;
                if (other > strength) strength = other;
                stops++;
                last = after;
                after += length;
            }
            while (after < size && closes(code_point(text + after, &length))) after += length;
            int64_t end = after;
            while (after < size && is_space(text, after, &length)) after += length;
            if (after < size && (after > end || strength == 2)) {
                uint32_t next = code_point(text + after, &length);
                int single = stops == 1 && text[last] == '.';
                if (!is_lower(next) && !(single && abbreviates(text, begin, last, next))) cut = end;
            }
            if (cut < 0) after = end; /* the white space may still hold a blank line */
        }
        if (cut >= 0 && after < size) starts[found++] = (int32_t)cut;
        if (cut >= 0) begin = after;
        at = after;
    }
    return found;
}

/* first: [documents + 1] index of each document's first start; starts: room for half the bytes. */
void sentence_starts(const uint8_t *text, const int64_t *offsets, int64_t documents, int64_t *first, int32_t *starts) {
    int64_t found = 0;
    for (int64_t d = 0; d < documents; d++) {
        first[d] = found;
        found += starts_of(text + offsets[d], offsets[d + 1] - offsets[d], starts + found);
    }
    first[documents] = found;
}

/* The tokens at which sentences begin, by the bytes that each id stands for.
 *
 * ids [tokens], lengths [documents]: of the documents. sizes [vocabulary]: bytes of each id, below 0 where it has none.
 * prefix: 1 where a space may have been put before a document. offsets, first, starts: as above; `starts` is replaced by
 * the first token that begins at or after each (of equal ones and those at the end only one, or none, stays), counted
 * from 1 for each document, and `first` follows. failed [documents]: 1 where the sizes do not add up to the text; such
 * a document has no starts left. Returns the number of starts that stay.
 */
int64_t starts_by_bytes(const uint32_t *ids, const int64_t *lengths, int64_t documents, const int32_t *sizes,
                        int64_t vocabulary, int prefix, const int64_t *offsets, int64_t *first, int32_t *starts,
                        uint8_t *failed) {
    int64_t kept = 0, token = 0, from = first[0];
    for (int64_t d = 0; d < documents; d++) {
        int64_t end = first[d + 1], size = offsets[d + 1] - offsets[d], tokens = lengths[d], shift = 0, wrong = 0;
        int64_t begin = kept, position = 0, i = 0, last = 0;
        const uint32_t *of = ids + token;
        if (prefix && end > from) {
            for (int64_t t = 0; t < tokens; t++) shift += of[t] < vocabulary ? sizes[of[t]] : 0;
            shift = shift - size == 1;
        }
        for (int64_t s = from; s < end; s++) {
            int64_t wanted = starts[s] + shift;
            while (i < tokens && position < wanted) {
                int32_t bytes = of[i] < vocabulary ? sizes[of[i]] : -1;
                wrong |= bytes < 0;
                position += bytes;
                i++;
            }
            if (i > last && i < tokens) starts[kept++] = (int32_t)(last = i);
        }
        if (end > from) { /* a document of one sentence need not add up */
            for (; i < tokens; i++) {
                int32_t bytes = of[i] < vocabulary ? sizes[of[i]] : -1;
                wrong |= bytes < 0;
                position += bytes;
            }
            wrong |= position != size + shift;
        }
        failed[d] = wrong != 0;
        if (wrong) kept = begin;
        first[d] = begin;
        from = end;
        token += tokens;
    }
    first[documents] = kept;
    return kept;
}

static int is_cjk(uint32_t code) { /* as BERT's pre-tokenizer has it */
    return (code >= 0x4E00 && code <= 0x9FFF) || (code >= 0x3400 && code <= 0x4DBF) ||
           (code >= 0x20000 && code <= 0x2A6DF) || (code >= 0x2A700 && code <= 0x2CEAF) ||
           (code >= 0xF900 && code <= 0xFAFF) || (code >= 0x2F800 && code <= 0x2FA1F);
}

static int is_bert_punctuation(uint32_t code) {
    if (code < 0x80) return code > ' ' && code != 0x7F && !is_letter((uint8_t)code) && !is_digit((uint8_t)code);
    return class_of(code) & CLASS_PUNCTUATION;
}

static int is_alone(uint32_t code) { return is_bert_punctuation(code) || is_cjk(code); }

static int is_white(uint32_t code) {
    return code < 0x80 ? code == ' ' || (code >= '\t' && code <= '\r') : class_of(code) & CLASS_SPACE;
}

/* Control and format characters, which BERT's normalizer drops: those that are met in text. */
static int is_control(uint32_t code) {
    if (code < 0xA0) return code < ' ' || code >= 0x7F;
    return code == 0xAD || (code >= 0x200B && code <= 0x200F) || (code >= 0x202A && code <= 0x202E) ||
           (code >= 0x2060 && code <= 0x206F) || code == 0xFEFF || (code >= 0xFFF9 && code <= 0xFFFB) ||
           code == 0xFFFD;
}

/* Characters of the normalized text that a character gives: none for white space and controls and, where marks are
 * dropped (after decomposition), none for marks and the jamo of a Hangul syllable. */
static int units_of(uint32_t code, int strips) {
    if (code < 0x80) return !is_white(code) && !is_control(code);
    uint8_t class = class_of(code);
    if ((class & CLASS_SPACE) || is_control(code)) return 0;
    if (!strips) return 1;
    if (code >= 0xAC00 && code <= 0xD7A3) return (code - 0xAC00) % 28 ? 3 : 2;
    return !(class & CLASS_MARK);
}

/* The same for WordPiece: sizes are characters, 0 for the unknown token, which stands for a whole word: a run of
 * neither white space nor punctuation nor ideographs, or one of the latter two. strips: 1 where marks are dropped. */
int64_t starts_by_words(const uint32_t *ids, const int64_t *lengths, int64_t documents, const int32_t *sizes,
                        int64_t vocabulary, int strips, const uint8_t *text, const int64_t *offsets, int64_t *first,
                        int32_t *starts, uint8_t *failed) {
    int64_t kept = 0, token = 0, from = first[0];
    for (int64_t d = 0; d < documents; d++) {
        const uint8_t *of = text + offsets[d];
        int64_t end = first[d + 1], size = offsets[d + 1] - offsets[d], tokens = lengths[d], at = 0, s = from;
        int64_t begin = kept, last = 0, i = 0;
        int length = 1, wrong = 0;
        int32_t rest = 0; /* of the character at `at`, which a token before has begun */
        for (; i < tokens && !wrong && end > from; i++) { /* a document of one sentence need not add up */
            uint32_t id = ids[token + i], code = 0;
            int32_t left = id < vocabulary ? sizes[id] : -1, units;
            while (!rest && at < size && !units_of(code = code_point(of + at, &length), strips)) at += length;
            wrong = left < 0 || at >= size;
            if (wrong) break;
            int begins = s < end && starts[s] <= at;
            while (s < end && starts[s] <= at) s++;
            if (begins && i > last) starts[kept++] = (int32_t)(last = i);
            if (left == 0) { /* unknown: a whole word */
                wrong = rest != 0;
                if (is_alone(code)) {
                    at += length;
                    continue;
                }
                do at += length;
                while (at < size && !is_white(code = code_point(of + at, &length)) && !is_alone(code));
                continue;
            }
            while (left > 0) {
                uint64_t word;
                if (!rest && at + 8 <= size && left <= 8 && (memcpy(&word, of + at, 8), !(word & EACH(0x80)))) {
                    at += left; /* ASCII that is not white space, or the sum will be wrong */
                    break;
                }
                if (at >= size) {
                    wrong = 1;
                    break;
                }
                code = code_point(of + at, &length);
                units = rest ? rest : units_of(code, strips);
                rest = units > left ? units - left : 0;
                left -= units;
                if (!rest) at += length;
            }
        }
        wrong |= rest != 0;
        while (!wrong && at < size && end > from) {
            wrong = units_of(code_point(of + at, &length), strips) != 0;
            at += length;
        }
        failed[d] = (uint8_t)wrong;
        if (wrong) kept = begin;
        first[d] = begin;
        from = end;
        token += tokens;
    }
    first[documents] = kept;
    return kept;
}

/* ids with `end` behind each document, into out [tokens + documents]; returns the largest id. */
uint32_t with_ends_16(const uint32_t *ids, const int64_t *lengths, int64_t documents, uint32_t end, uint16_t *out) {
    uint32_t largest = end;
    for (int64_t d = 0; d < documents; d++) {
        for (int64_t i = 0; i < lengths[d]; i++) {
            largest = ids[i] > largest ? ids[i] : largest;
            out[i] = (uint16_t)ids[i];
        }
        ids += lengths[d];
        out += lengths[d];
        *out++ = (uint16_t)end;
    }
    return largest;
}

uint32_t with_ends_32(const uint32_t *ids, const int64_t *lengths, int64_t documents, uint32_t end, uint32_t *out) {
    uint32_t largest = end;
    for (int64_t d = 0; d < documents; d++) {
        for (int64_t i = 0; i < lengths[d]; i++) {
            largest = ids[i] > largest ? ids[i] : largest;
            out[i] = ids[i];
        }
        ids += lengths[d];
        out += lengths[d];
        *out++ = end;
    }
    return largest;
}
