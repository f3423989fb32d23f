/* The cleaning rules over UTF-8: docs/cleaning.md defines each of them in words and formulas.

A document passes the rules in the order asked for, until one drops it. Lengths are in code points. Words are those of
spaCy's tokenizer for English (the affix, infix, URL and special-word rules of spaCy 3.8, MIT licence), because the
published thresholds were set on them; a word is known by its 64-bit hash afterwards. A chunk between two spaces is
always split alike, so its words are looked up in a cache; the cache never changes a result.

Every text is followed by PADDING readable bytes, which lets chunks be hashed eight bytes at a time. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "unicode_table.h"
#include "words_table.h"

#define PADDING 16
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Of longer documents, repeated n-grams are looked for in this many words only, so that memory stays bounded. */
#define MOST_WORDS ((int64_t)1 << 21)

/* A longer run without white space is split into words piece by piece, for the same reason. */
#define LONGEST_CHUNK 65536

/* The order is that of data_prep/rules.py; a test compares them. */
#define PARAMETERS(X) \
    X(length, min_characters) X(length, max_characters) X(length, min_words) X(length, max_words) \
    X(symbol_ratio, max_symbol_ratio) \
    X(gopher_repetition, max_duplicate_paragraphs) X(gopher_repetition, max_duplicate_paragraph_characters) \
    X(gopher_repetition, max_duplicate_lines) X(gopher_repetition, max_duplicate_line_characters) \
    X(gopher_repetition, max_top_2_gram) X(gopher_repetition, max_top_3_gram) X(gopher_repetition, max_top_4_gram) \
    X(gopher_repetition, max_duplicate_5_grams) X(gopher_repetition, max_duplicate_6_grams) \
    X(gopher_repetition, max_duplicate_7_grams) X(gopher_repetition, max_duplicate_8_grams) \
    X(gopher_repetition, max_duplicate_9_grams) X(gopher_repetition, max_duplicate_10_grams) \
    X(gopher_quality, min_words) X(gopher_quality, max_words) X(gopher_quality, min_mean_word_length) \
    X(gopher_quality, max_mean_word_length) X(gopher_quality, max_hash_ratio) X(gopher_quality, max_ellipsis_ratio) \
    X(gopher_quality, max_bullet_lines) X(gopher_quality, max_ellipsis_lines) X(gopher_quality, min_alphabetic_words) \
    X(gopher_quality, min_stop_words) \
    X(c4, max_word_length) X(c4, terminal_punctuation) X(c4, min_words_per_line) X(c4, lorem_ipsum) X(c4, javascript) \
    X(c4, curly_bracket) X(c4, policy) X(c4, citations) X(c4, min_sentences) \
    X(fineweb, min_terminal_punctuation_lines) X(fineweb, max_short_lines) X(fineweb, short_line_length) \
    X(fineweb, max_duplicate_line_characters) X(fineweb, max_newlines_per_word)
#define NAME(rule, parameter) P_##rule##_##parameter,
enum { PARAMETERS(NAME) PARAMETER_COUNT };
#undef NAME

enum { RULE_LENGTH, RULE_SYMBOL_RATIO, RULE_GOPHER_REPETITION, RULE_GOPHER_QUALITY, RULE_C4, RULE_FINEWEB };
enum { LINES_LONG_WORD, LINES_PUNCTUATION, LINES_FEW_WORDS, LINES_JAVASCRIPT, LINES_POLICY, LINES_KEPT, LINE_COUNTS };

enum { WORD_ALPHABETIC = 1, WORD_SYMBOL = 2, WORD_PUNCTUATION = 4, WORD_ENDS_SENTENCE = 8, WORD_STOP_SHIFT = 8 };

static const char *const stop_words[] = {"the", "be", "to", "of", "and", "that", "have", "with"};

typedef struct {
    uint64_t hash;
    uint32_t characters;
    uint32_t flags;
} Word;

typedef struct {
    int64_t words, characters, alphabetic; /* `words` but for symbols, whose characters are not counted either */
    int64_t symbols;
    uint32_t flags; /* of all of them together */
} WordSums;

/* The first MOST_WORDS words of a text, and the sums of those behind them. */
typedef struct {
    Word *items;
    int64_t count, capacity;
    WordSums rest;
} Words;

typedef struct {
    uint64_t key;
    uint32_t first, count;
} CacheSlot;

typedef struct {
    uint64_t hash;
    uint32_t first_split; /* into `splits` */
    uint8_t bytes, parts;
    bool merges; /* put together again when affixes have cut it */
} Special;

typedef struct {
    uint64_t key;
    uint32_t value;
    uint32_t count;
} Slot;

#define CACHE_SLOTS (1u << 16)
#define CACHE_WORDS (1u << 17)
#define SPECIAL_SLOTS (1u << 12)
#define ASCII 128

struct Rules {
    Words words;        /* of the text at hand, when `has_words` */
    bool has_words;
    Words line_words;
    CacheSlot cache[CACHE_SLOTS];
    Word cached[CACHE_WORDS];
    uint32_t cached_slots, cached_words;
    Special specials[SPECIAL_SLOTS];
    uint8_t splits[1 << 13];
    int longest_special;
    uint64_t stop_hashes[COUNT(stop_words)];
    uint8_t ascii_symbol[ASCII], ascii_affix[ASCII], ascii_quote[ASCII];
    Slot *slots;
    int64_t slot_capacity;
    uint32_t *numbers; /* scratch of the n-grams */
    int64_t number_capacity;
    uint32_t *points; /* a chunk's code points and their byte offsets */
    int64_t point_capacity;
    uint8_t *text; /* what a rule has left of the document */
    int64_t text_capacity;
    uint8_t *line;
    int64_t line_capacity;
    bool failed; /* out of memory */
};
typedef struct Rules Rules;

/* ---- memory, hashes, sets of code points ---- */

static bool reserve(Rules *rules, void **memory, int64_t *capacity, int64_t needed, size_t size) {
    if (needed <= *capacity)
        return true;
    int64_t larger = needed + (needed < 1 << 20 ? needed / 2 : needed / 8) + 64;
    void *moved = realloc(*memory, (size_t)larger * size);
    if (!moved) {
        rules->failed = true;
        return false;
    }
    *memory = moved;
    *capacity = larger;
    return true;
}

static inline uint64_t load8(const uint8_t *bytes) {
    uint64_t value;
    memcpy(&value, bytes, 8);
    return value;
}

static inline uint64_t mix(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD6E8FEB86659FD93u);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Reads up to 7 bytes past the end, of the padding; they do not enter the hash (little-endian machines). */
static inline uint64_t hash_bytes(const uint8_t *bytes, int64_t length) {
    uint64_t hash = (uint64_t)length * 0xA0761D6478BD642Fu + 1;
    while (length > 8) {
        hash = mix(hash, load8(bytes));
        bytes += 8;
        length -= 8;
    }
    uint64_t tail = length ? load8(bytes) << (8 * (8 - length)) : 0;
    return mix(hash, tail ^ 0x2545F4914F6CDD1Du);
}

static bool contains(const uint32_t *sorted, int count, uint32_t code) {
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (sorted[middle] < code)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && sorted[low] == code;
}
#define IN(set, code) contains(set, (int)COUNT(set), code)

/* Whether a code point lies in one of the sorted ranges, of which `bounds` holds first and last. */
static bool within(const uint32_t *bounds, int count, uint32_t code) {
    int low = 0, high = count / 2;
    while (low < high) {
        int middle = (low + high) / 2;
        if (bounds[2 * middle + 1] < code)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count / 2 && bounds[2 * low] <= code;
}
#define WITHIN(ranges, code) within(ranges, (int)COUNT(ranges), code)

static bool is_icon(uint32_t code) {
    return code >= 0x80 && (class_of(code) & CLASS_SYMBOL) && WITHIN(icons, code);
}

/* spaCy's letters: Latin, Greek and Cyrillic ones, and the blocks of scripts without case, which count as both. */
static inline bool is_digit(uint32_t code) { return code >= '0' && code <= '9'; }
static inline bool is_cased(uint32_t code) {
    return (class_of(code) & CLASS_ALPHA) &&
           (code < 0x2B0 || (code >= 0x370 && code < 0x530) || (code >= 0x1D00 && code < 0x1F00) ||
            (code >= 0x2C60 && code < 0x2C80) || (code >= 0xA720 && code < 0xA800) ||
            (code >= 0xAB30 && code < 0xAB65) || (code >= 0xFF21 && code <= 0xFF5A));
}
static inline bool is_alpha(uint32_t code) {
    return code < 0x80 ? (code | 32) >= 'a' && (code | 32) <= 'z' : is_cased(code) || WITHIN(uncased, code);
}
static inline bool is_upper(uint32_t code) {
    if (code < 0x80)
        return code >= 'A' && code <= 'Z';
    return is_cased(code) ? class_of(code) & CLASS_UPPER : WITHIN(uncased, code);
}
static inline bool is_lower(uint32_t code) {
    if (code < 0x80)
        return code >= 'a' && code <= 'z';
    return is_cased(code) ? !(class_of(code) & CLASS_UPPER) : WITHIN(uncased, code);
}
static inline bool is_affix(const Rules *rules, uint32_t code) {
    return code < ASCII ? rules->ascii_affix[code] : IN(affix_punctuation, code) || is_icon(code);
}
static inline bool is_quote(const Rules *rules, uint32_t code) {
    return code < ASCII ? rules->ascii_quote[code] : IN(quotes, code);
}

/* 1: ASCII white space; 2: the first byte of what may be other white space. */
static const uint8_t space_byte[256] = {
    [9] = 1, [10] = 1, [11] = 1, [12] = 1, [13] = 1, [28] = 1, [29] = 1, [30] = 1, [31] = 1, [32] = 1,
    [0xC2] = 2, [0xE1] = 2, [0xE2] = 2, [0xE3] = 2,
};

/* Bytes of the white space at `text`, 0 where there is none. */
static inline int space_at(const uint8_t *text, const uint8_t *end) {
    if (text >= end || !space_byte[*text])
        return 0;
    if (space_byte[*text] == 1)
        return 1;
    int length;
    uint32_t code = code_point(text, &length);
    return class_of(code) & CLASS_SPACE ? length : 0;
}

static inline const uint8_t *skip_space(const uint8_t *text, const uint8_t *end) {
    for (int size; (size = space_at(text, end));)
        text += size;
    return text;
}

#define EACH_BYTE(byte) (0x0101010101010101u * (uint64_t)(byte))

/* Bytes before the first one at `text` that is below `bound` or no ASCII, at most 8; reads 8 bytes. */
static inline int plain_bytes(const uint8_t *text, uint8_t bound) {
    uint64_t bytes = load8(text);
    uint64_t found = (((bytes - EACH_BYTE(bound)) & ~bytes) | bytes) & EACH_BYTE(0x80);
    return found ? __builtin_ctzll(found) >> 3 : 8;
}

/* The white space behind the chunk at `text`, or `end`. */
static inline const uint8_t *end_of_chunk(const uint8_t *text, const uint8_t *end) {
    while (text < end) {
        int plain = plain_bytes(text, 0x21);
        text += plain;
        if (plain == 8)
            continue;
        if (text >= end)
            return end;
        if (space_byte[*text] && space_at(text, end))
            return text;
        text++;
    }
    return end;
}

static inline const uint8_t *last_point(const uint8_t *start, const uint8_t *end) {
    do
        end--;
    while (end > start && (*end & 0xC0) == 0x80);
    return end;
}

static inline const uint8_t *trim_end(const uint8_t *start, const uint8_t *end) {
    while (end > start) {
        const uint8_t *last = last_point(start, end);
        if (!space_at(last, end))
            break;
        end = last;
    }
    return end;
}

static int64_t characters_of(const uint8_t *text, const uint8_t *end) {
    int64_t count = 0;
    for (; text < end; text++)
        count += (*text & 0xC0) != 0x80;
    return count;
}

/* ---- words ---- */

static bool push_word(Rules *rules, Words *words, Word word) {
    if (words->count >= words->capacity &&
        !reserve(rules, (void **)&words->items, &words->capacity, words->count + 1, sizeof(Word)))
        return false;
    words->items[words->count++] = word;
    return true;
}

static inline void add_sums(WordSums *sums, Word word) {
    sums->flags |= word.flags;
    sums->alphabetic += word.flags & WORD_ALPHABETIC;
    bool symbol = word.flags & WORD_SYMBOL;
    sums->symbols += symbol;
    sums->words += !symbol;
    sums->characters += symbol ? 0 : word.characters;
}

static Word make_word(const Rules *rules, const uint8_t *text, int64_t bytes) {
    Word word = {hash_bytes(text, bytes), 0, WORD_SYMBOL | WORD_PUNCTUATION};
    uint32_t code = 0;
    for (int64_t at = 0; at < bytes;) {
        int length;
        code = code_point(text + at, &length);
        uint8_t class = class_of(code);
        if (class & CLASS_ALPHA)
            word.flags |= WORD_ALPHABETIC;
        if (!(class & CLASS_PUNCTUATION))
            word.flags &= ~(uint32_t)WORD_PUNCTUATION;
        if (!(code < ASCII ? rules->ascii_symbol[code] : IN(word_symbols, code)))
            word.flags &= ~(uint32_t)WORD_SYMBOL;
        word.characters++;
        at += length;
    }
    if (word.characters == 1 && IN(sentence_ends, code))
        word.flags |= WORD_ENDS_SENTENCE;
    for (uint32_t stop = 0; stop < COUNT(stop_words); stop++)
        if (word.hash == rules->stop_hashes[stop])
            word.flags |= 1u << (WORD_STOP_SHIFT + stop);
    return word;
}

static const Special *find_special(const Rules *rules, const uint8_t *text, int64_t bytes) {
    if (bytes > rules->longest_special)
        return NULL;
    uint64_t hash = hash_bytes(text, bytes);
    for (uint32_t at = hash & (SPECIAL_SLOTS - 1); rules->specials[at].parts; at = (at + 1) & (SPECIAL_SLOTS - 1))
        if (rules->specials[at].hash == hash && rules->specials[at].bytes == bytes)
            return &rules->specials[at];
    return NULL;
}

/* A chunk as code points: at[i] is the byte offset of point[i]; at[count] its length. */
typedef struct {
    const uint8_t *text;
    const uint32_t *point;
    const uint32_t *at;
} Chunk;

static inline const Special *special_between(const Rules *rules, Chunk chunk, int64_t start, int64_t end) {
    return find_special(rules, chunk.text + chunk.at[start], chunk.at[end] - chunk.at[start]);
}

static int64_t prefix_of(const Rules *rules, Chunk chunk, int64_t start, int64_t end) {
    uint32_t first = chunk.point[start];
    if (first == '.') {
        int64_t dots = start;
        while (dots < end && chunk.point[dots] == '.')
            dots++;
        return dots - start > 1 ? dots - start : 0;
    }
    if (first == '+')
        return !(start + 1 < end && is_digit(chunk.point[start + 1]));
    if (first == 0xA7 || first == '%' || first == '=' || first == 0x2014 || first == 0x2013 || is_affix(rules, first))
        return 1;
    if (IN(currencies, first))
        return 1;
    if ((first == 'C' || first == 'A') && start + 1 < end && chunk.point[start + 1] == '$')
        return 2;
    return end - start > 2 && first == 'U' && chunk.point[start + 1] == 'S' && chunk.point[start + 2] == '$' ? 3 : 0;
}

/* The longest unit or currency at the end, right behind a digit. */
static int64_t unit_of(Chunk chunk, int64_t start, int64_t end) {
    for (int64_t from = end - start > 5 ? end - 5 : start + 1; from < end; from++) {
        if (!is_digit(chunk.point[from - 1]) || is_digit(chunk.point[from]))
            continue;
        uint32_t bytes = chunk.at[end] - chunk.at[from];
        const char *text = (const char *)chunk.text + chunk.at[from];
        for (size_t unit = 0; unit < COUNT(units); unit++)
            if (units[unit][0] == *text && strlen(units[unit]) == bytes && !memcmp(units[unit], text, bytes))
                return end - from;
        const uint32_t *point = chunk.point + from;
        if (end - from == 1 && (*point == '+' || IN(currencies, *point)))
            return 1;
        if (end - from == 2 && point[1] == '$' && (point[0] == 'C' || point[0] == 'A'))
            return 2;
        if (end - from == 3 && point[0] == 'U' && point[1] == 'S' && point[2] == '$')
            return 3;
    }
    return 0;
}

static int64_t suffix_of(const Rules *rules, Chunk chunk, int64_t start, int64_t end) {
    if (start >= end)
        return 0;
    uint32_t last = chunk.point[end - 1], before = end - start > 1 ? chunk.point[end - 2] : 0;
    if (last == '.') {
        int64_t dots = end;
        while (dots > start && chunk.point[dots - 1] == '.')
            dots--;
        if (end - dots > 1)
            return end - dots;
        if (!before)
            return 0;
        if (is_digit(before) || is_lower(before) || before == '%' || before == 0xB2 || before == '-' || before == '+' ||
            before == '|' || (is_affix(rules, before) && !is_icon(before)))
            return 1;
        if (end - start > 2 && is_upper(before) && is_upper(chunk.point[end - 3]))
            return 1;
        return end - start > 2 && chunk.point[end - 3] == 0xB0 && strchr("FfCcKk", (int)before) && before < 0x80;
    }
    if (last == 0x2026)
        return before == 0x2026 ? 2 : 1;
    if (is_affix(rules, last) || last == 0x2014 || last == 0x2013)
        return 1;
    if ((last == 's' || last == 'S') && (before == '\'' || before == 0x2019))
        return 2;
    return unit_of(chunk, start, end);
}

/* The end of the infix that starts at `at`, or `at` where none does. */
static int64_t infix_at(const Rules *rules, Chunk chunk, int64_t start, int64_t end, int64_t at) {
    uint32_t code = chunk.point[at];
    if (code >= 0x80 && (code == 0x2026 || is_icon(code)))
        return at + 1;
    uint32_t before = at > start ? chunk.point[at - 1] : 0, after = at + 1 < end ? chunk.point[at + 1] : 0;
    if (code == '.') {
        if (after == '.') {
            while (at < end && chunk.point[at] == '.')
                at++;
            return at;
        }
        return before && after && (is_lower(before) || is_quote(rules, before)) &&
                       (is_upper(after) || is_quote(rules, after))
                   ? at + 1
                   : at;
    }
    if ((code == '+' || code == '-' || code == '*' || code == '^') && is_digit(before) &&
        (is_digit(after) || after == '-'))
        return at + 1;
    if (code == ',')
        return is_alpha(before) && is_alpha(after) ? at + 1 : at;
    if (!is_alpha(before) && !is_digit(before))
        return at;
    if (code == ':' || code == '<' || code == '>' || code == '=' || code == '/')
        return is_alpha(after) ? at + 1 : at;
    if (code == '~' || code == 0x2013)
        return is_alpha(after) ? at + 1 : at;
    if (code == '-' || code == 0x2014) {
        int64_t last = at;
        while (last < end && chunk.point[last] == code)
            last++;
        return last - at <= (code == '-' ? 3 : 2) && last < end && is_alpha(chunk.point[last]) ? last : at;
    }
    return at;
}

static inline bool in_host(uint32_t code) {
    return code < 0x80 ? is_digit(code) || is_alpha(code) : code >= 0xA1 && code <= 0xFFFF;
}

/* Whether [start, end) is host[:port][/path], the host a dotted name with a lower-case last label, or an address. */
static bool host_matches(Chunk chunk, int64_t start, int64_t end) {
    int64_t host = start, labels = 0, label = start;
    bool numeric = true;
    for (; host <= end; host++) {
        uint32_t code = host < end ? chunk.point[host] : 0;
        if (host < end && (in_host(code) || code == '-' || code == '_')) {
            numeric = numeric && is_digit(code);
            continue;
        }
        if (host == label)
            return false;
        if (host < end && code == '.') {
            if (!in_host(chunk.point[label]) || !in_host(chunk.point[host - 1]) || host - label > 64)
                return false;
            labels++;
            label = host + 1;
            continue;
        }
        break;
    }
    int64_t after = host;
    if (after < end && chunk.point[after] == ':') {
        after++;
        int64_t port = after;
        while (after < end && is_digit(chunk.point[after]))
            after++;
        if (after - port < 2 || after - port > 5)
            return false;
    }
    if (after < end && chunk.point[after] != '/' && chunk.point[after] != '?' && chunk.point[after] != '#')
        return false;
    if (numeric) { /* four numbers; private networks and first and last addresses are not URLs */
        if (labels != 3)
            return false;
        int number[4] = {0, 0, 0, 0}, digits = 0, index = 0;
        for (int64_t at = start; at < host; at++) {
            if (chunk.point[at] == '.') {
                digits = 0;
                index++;
                continue;
            }
            number[index] = number[index] * 10 + (int)(chunk.point[at] - '0');
            if (++digits > 3)
                return false;
        }
        bool private = number[0] == 10 || number[0] == 127 || (number[0] == 169 && number[1] == 254) ||
                       (number[0] == 192 && number[1] == 168) || (number[0] == 172 && number[1] >= 16 && number[1] <= 31);
        return !private && number[0] >= 1 && number[0] <= 223 && number[1] <= 255 && number[2] <= 255 && number[3] >= 1 &&
               number[3] <= 254;
    }
    if (!labels || host - label < 2 || host - label > 63)
        return false;
    for (int64_t at = label; at < host; at++)
        if (!is_lower(chunk.point[at]))
            return false;
    return true;
}

static bool is_url(Chunk chunk, int64_t start, int64_t end) {
    bool dot = false;
    for (int64_t at = start; at < end && !dot; at++)
        dot = chunk.point[at] == '.';
    if (!dot)
        return false;
    if (host_matches(chunk, start, end))
        return true;
    int64_t scheme = start;
    while (scheme < end && (in_host(chunk.point[scheme]) || strchr("+-._", (int)chunk.point[scheme])))
        scheme++;
    if (scheme - start > 1 && scheme + 3 < end && chunk.point[scheme] == ':' && chunk.point[scheme + 1] == '/' &&
        chunk.point[scheme + 2] == '/' && host_matches(chunk, scheme + 3, end))
        return true;
    for (int64_t at = start + 1; at + 1 < end; at++)
        if (chunk.point[at] == '@' && host_matches(chunk, at + 1, end))
            return true;
    return false;
}

typedef struct {
    Rules *rules;
    Words *words;
    Chunk chunk;
    uint32_t *ends; /* where each word of the chunk ends, in bytes of the chunk */
    int64_t count;
} Splitting;

static void emit(Splitting *splitting, int64_t end) { splitting->ends[splitting->count++] = splitting->chunk.at[end]; }

static void emit_special(Splitting *splitting, const Special *special, int64_t start) {
    uint32_t at = splitting->chunk.at[start];
    for (int part = 0; part < special->parts; part++) {
        at += splitting->rules->splits[special->first_split + part];
        splitting->ends[splitting->count++] = at;
    }
}

static void split_middle(Splitting *splitting, int64_t start, int64_t end) {
    Chunk chunk = splitting->chunk;
    const Special *special = special_between(splitting->rules, chunk, start, end);
    if (special) {
        emit_special(splitting, special, start);
        return;
    }
    if (is_url(chunk, start, end)) {
        emit(splitting, end);
        return;
    }
    int64_t word = start;
    for (int64_t at = start; at < end;) {
        int64_t infix = infix_at(splitting->rules, chunk, start, end, at);
        if (infix == at) {
            at++;
            continue;
        }
        if (at != start) {
            if (at != word)
                emit(splitting, at);
            emit(splitting, infix);
            word = infix;
        }
        at = infix;
    }
    if (word != end)
        emit(splitting, end);
}

/* Special words that affixes have cut are put together again, the longest first. */
static void merge_specials(Splitting *splitting) {
    enum { MOST = 8 };
    const Rules *rules = splitting->rules;
    uint32_t *ends = splitting->ends;
    for (int64_t first = 0; first + 1 < splitting->count; first++) {
        uint32_t start = first ? ends[first - 1] : 0;
        int64_t last = first + MOST < splitting->count ? first + MOST : splitting->count;
        for (int64_t end = last; end > first + 1; end--) {
            uint32_t bytes = ends[end - 1] - start;
            const Special *special = find_special(rules, splitting->chunk.text + start, bytes);
            if (!special || !special->merges || special->parts >= end - first)
                continue;
            uint32_t at = start;
            for (int part = 0; part < special->parts; part++) {
                at += rules->splits[special->first_split + part];
                ends[first + part] = at;
            }
            memmove(ends + first + special->parts, ends + end, (size_t)(splitting->count - end) * sizeof(*ends));
            splitting->count -= end - first - special->parts;
            break;
        }
    }
}

/* Code points of a text into point, and where each begins into at, the end too [bytes + 1]. Returns how many. */
static int64_t decode(const uint8_t *text, int64_t bytes, uint32_t *point, uint32_t *at) {
    int64_t count = 0;
    for (int64_t byte = 0; byte < bytes; count++) {
        int length;
        at[count] = (uint32_t)byte;
        point[count] = code_point(text + byte, &length);
        byte += length;
    }
    at[count] = (uint32_t)bytes;
    return count;
}

/* spaCy's algorithm for one chunk without white space: affixes off both ends, then the middle at its infixes. */
static bool split_chunk(Rules *rules, const uint8_t *text, int64_t bytes, Words *words) {
    if (!reserve(rules, (void **)&rules->points, &rules->point_capacity, 5 * (bytes + 2), sizeof(uint32_t)))
        return false;
    uint32_t *point = rules->points, *at = point + bytes + 1, *ends = at + bytes + 1, *suffixes = ends + bytes + 1;
    int64_t count = decode(text, bytes, point, at);
    Chunk chunk = {text, point, at};
    Splitting splitting = {rules, words, chunk, ends, 0};
    int64_t start = 0, end = count, suffix_count = 0;
    while (start < end) {
        if (special_between(rules, chunk, start, end))
            break;
        int64_t prefix = prefix_of(rules, chunk, start, end);
        if (prefix && start + prefix < end && special_between(rules, chunk, start + prefix, end)) {
            start += prefix;
            emit(&splitting, start);
            break;
        }
        int64_t suffix = suffix_of(rules, chunk, start + prefix, end);
        if (suffix && end - suffix > start && special_between(rules, chunk, start, end - suffix)) {
            end -= suffix;
            suffixes[suffix_count++] = (uint32_t)(end + suffix);
            break;
        }
        if (!prefix && !suffix)
            break;
        if (prefix) {
            start += prefix;
            emit(&splitting, start);
        }
        if (suffix) {
            suffixes[suffix_count++] = (uint32_t)end;
            end -= suffix;
        }
    }
    if (start < end)
        split_middle(&splitting, start, end);
    while (suffix_count)
        emit(&splitting, suffixes[--suffix_count]);
    if (splitting.count > 1)
        merge_specials(&splitting);
    uint32_t from = 0;
    for (int64_t word = 0; word < splitting.count; word++) {
        if (!push_word(rules, words, make_word(rules, text + from, ends[word] - from)))
            return false;
        from = ends[word];
    }
    return true;
}

static inline CacheSlot *cache_slot(Rules *rules, uint64_t key) {
    uint32_t at = (uint32_t)(key >> 20) & (CACHE_SLOTS - 1);
    while (rules->cache[at].count && rules->cache[at].key != key)
        at = (at + 1) & (CACHE_SLOTS - 1);
    return &rules->cache[at];
}

static bool add_chunk(Rules *rules, const uint8_t *text, int64_t bytes, Words *words) {
    uint64_t key = hash_bytes(text, bytes);
    CacheSlot *slot = cache_slot(rules, key);
    if (slot->count) {
        const Word *cached = rules->cached + slot->first;
        if (words->count + slot->count > words->capacity &&
            !reserve(rules, (void **)&words->items, &words->capacity, words->count + slot->count, sizeof(Word)))
            return false;
        for (uint32_t word = 0; word < slot->count; word++)
            words->items[words->count + word] = cached[word];
        words->count += slot->count;
        return true;
    }
    int64_t before = words->count;
    if (!split_chunk(rules, text, bytes, words))
        return false;
    int64_t added = words->count - before;
    if (bytes > 64 || added > 32)
        return true;
    if (rules->cached_slots >= CACHE_SLOTS / 2 || rules->cached_words + added > CACHE_WORDS) {
        memset(rules->cache, 0, sizeof(rules->cache));
        rules->cached_slots = rules->cached_words = 0;
        slot = cache_slot(rules, key);
    }
    *slot = (CacheSlot){key, rules->cached_words, (uint32_t)added};
    memcpy(rules->cached + rules->cached_words, words->items + before, (size_t)added * sizeof(Word));
    rules->cached_words += (uint32_t)added;
    rules->cached_slots++;
    return true;
}

static bool split_words(Rules *rules, const uint8_t *text, const uint8_t *end, Words *words) {
    words->count = 0;
    words->rest = (WordSums){0};
    while (text < end) {
        if (space_byte[*text]) {
            int size = space_at(text, end);
            if (size) {
                text += size;
                continue;
            }
        }
        const uint8_t *chunk = text;
        text = end_of_chunk(text, end);
        if (text - chunk > LONGEST_CHUNK)
            text = last_point(chunk, chunk + LONGEST_CHUNK);
        if (!add_chunk(rules, chunk, text - chunk, words))
            return false;
        if (words->count > MOST_WORDS) {
            for (int64_t at = MOST_WORDS; at < words->count; at++)
                add_sums(&words->rest, words->items[at]);
            words->count = MOST_WORDS;
        }
    }
    return true;
}

/* ---- the document at hand ---- */

typedef struct {
    Rules *rules;
    const double *parameters;
    const uint8_t *text, *end;
    bool edited;
    int64_t characters;
    double value; /* what was measured, where a rule drops the document */
    int64_t *line_counts;
} Document;

static const Words *words_of(Document *document) {
    Rules *rules = document->rules;
    if (!rules->has_words)
        rules->has_words = split_words(rules, document->text, document->end, &rules->words);
    return &rules->words;
}

/* The dropping reasons are parameters; 0 keeps. A threshold of NaN is switched off: it compares false. */
#define ABOVE(parameter, measured) \
    do { \
        double measured_ = (measured); \
        if (measured_ > document->parameters[parameter]) { \
            document->value = measured_; \
            return parameter + 1; \
        } \
    } while (0)
#define BELOW(parameter, measured) \
    do { \
        double measured_ = (measured); \
        if (measured_ < document->parameters[parameter]) { \
            document->value = measured_; \
            return parameter + 1; \
        } \
    } while (0)

static int rule_length(Document *document) {
    BELOW(P_length_min_characters, (double)document->characters);
    ABOVE(P_length_max_characters, (double)document->characters);
    int64_t words = 0;
    for (const uint8_t *text = skip_space(document->text, document->end); text < document->end;) {
        words++;
        text = skip_space(end_of_chunk(text, document->end), document->end);
    }
    BELOW(P_length_min_words, (double)words);
    ABOVE(P_length_max_words, (double)words);
    return 0;
}

static int rule_symbol_ratio(Document *document) {
    int64_t symbols = 0;
    for (const uint8_t *text = document->text; text < document->end;) {
        int length;
        symbols += !(class_of(code_point(text, &length)) & (CLASS_ALNUM | CLASS_SPACE | CLASS_MARK));
        text += length;
    }
    ABOVE(P_symbol_ratio_max_symbol_ratio, (double)symbols / (double)document->characters);
    return 0;
}

/* ---- repetition ---- */

static Slot *clear_slots(Rules *rules, int64_t entries, uint64_t *mask) {
    int64_t size = 64;
    while (size < 2 * entries)
        size *= 2;
    if (!reserve(rules, (void **)&rules->slots, &rules->slot_capacity, size, sizeof(Slot)))
        return NULL;
    memset(rules->slots, 0, (size_t)size * sizeof(Slot));
    *mask = (uint64_t)size - 1;
    return rules->slots;
}

static inline Slot *find_slot(Slot *slots, uint64_t mask, uint64_t key) {
    uint64_t at = (key ^ key >> 32) & mask;
    while (slots[at].count && slots[at].key != key)
        at = (at + 1) & mask;
    return &slots[at];
}

typedef struct {
    int64_t pieces, duplicates, duplicate_characters;
} Repetition;

enum { PIECE_LINES, PIECE_PARAGRAPHS, PIECE_FILLED_LINES };

/* The end of the line or paragraph at `text`: of one line for PIECE_LINES, before two or more for paragraphs. */
static const uint8_t *end_of_piece(const uint8_t *text, const uint8_t *end, int kind) {
    while (true) {
        const uint8_t *newline = memchr(text, '\n', (size_t)(end - text));
        if (!newline)
            return end;
        if (kind != PIECE_PARAGRAPHS || (newline + 1 < end && newline[1] == '\n'))
            return newline;
        text = newline + 1;
    }
}

/* PIECE_LINES: between runs of newlines, an empty first or last piece included (re.split).
   PIECE_FILLED_LINES: lines that are not blank. PIECE_PARAGRAPHS: between runs of two or more newlines. */
static Repetition repetition(Rules *rules, const uint8_t *text, const uint8_t *end, int kind) {
    Repetition found = {0, 0, 0};
    uint64_t mask;
    int64_t newlines = 1;
    for (const uint8_t *at = text; at < end; at++)
        newlines += *at == '\n';
    Slot *slots = clear_slots(rules, newlines + 1, &mask);
    if (!slots)
        return found;
    while (true) {
        const uint8_t *last = end_of_piece(text, end, kind);
        if (kind != PIECE_FILLED_LINES || skip_space(text, last) < last) {
            uint64_t key = hash_bytes(text, last - text);
            Slot *slot = find_slot(slots, mask, key);
            found.pieces++;
            if (slot->count) {
                found.duplicates++;
                found.duplicate_characters += characters_of(text, last);
            }
            slot->key = key;
            slot->count++;
        }
        if (last == end)
            return found;
        text = last + 1;
        if (kind != PIECE_FILLED_LINES)
            while (text < end && *text == '\n')
                text++;
    }
}

/* The n-grams that occur more than once: where they start, ascending, and which they are. */
typedef struct {
    uint32_t *place, *number;
    int64_t count;
    int64_t distinct;
    uint32_t most, most_place; /* count of the most frequent, the first of them; where it starts first */
} Grams;

/* Keeps of `grams` (numbered 1..distinct, `occurrences` and `first_place` by number) those that occur again. */
static void keep_repeated(Grams *grams, const uint32_t *occurrences, const uint32_t *first_place) {
    grams->most = 1;
    grams->most_place = 0;
    for (int64_t number = 1; number <= grams->distinct; number++)
        if (occurrences[number] > grams->most) {
            grams->most = occurrences[number];
            grams->most_place = first_place[number];
        }
    int64_t kept = 0;
    for (int64_t at = 0; at < grams->count; at++)
        if (occurrences[grams->number[at]] > 1) {
            grams->place[kept] = grams->place[at];
            grams->number[kept++] = grams->number[at];
        }
    grams->count = kept;
}

static void count_gram(Slot *slots, uint64_t mask, uint64_t key, Grams *grams, uint32_t place, uint32_t *occurrences,
                       uint32_t *first_place) {
    Slot *slot = find_slot(slots, mask, key);
    if (!slot->count) {
        slot->key = key;
        slot->count = 1;
        slot->value = (uint32_t)++grams->distinct;
        occurrences[slot->value] = 0;
        first_place[slot->value] = place;
    }
    occurrences[slot->value]++;
    grams->place[grams->count] = place;
    grams->number[grams->count++] = slot->value;
}

static inline double ratio(int64_t part, int64_t whole) { return (double)part / (double)whole; }

static int rule_gopher_repetition(Document *document) {
    Rules *rules = document->rules;
    const uint8_t *stripped = skip_space(document->text, document->end);
    Repetition paragraphs = repetition(rules, stripped, trim_end(stripped, document->end), PIECE_PARAGRAPHS);
    ABOVE(P_gopher_repetition_max_duplicate_paragraphs, ratio(paragraphs.duplicates, paragraphs.pieces));
    ABOVE(P_gopher_repetition_max_duplicate_paragraph_characters,
          ratio(paragraphs.duplicate_characters, document->characters));
    Repetition lines = repetition(rules, document->text, document->end, PIECE_LINES);
    ABOVE(P_gopher_repetition_max_duplicate_lines, ratio(lines.duplicates, lines.pieces));
    ABOVE(P_gopher_repetition_max_duplicate_line_characters, ratio(lines.duplicate_characters, document->characters));

    const Words *words = words_of(document);
    int64_t count = words->count;
    if (count < 2 || !reserve(rules, (void **)&rules->numbers, &rules->number_capacity, 5 * (count + 1), sizeof(uint32_t)))
        return 0;
    uint32_t *occurrences = rules->numbers, *first_place = occurrences + count + 1, *before = first_place + count + 1;
    Grams grams = {before + count + 1, before + 2 * (count + 1), 0, 0, 0, 0};
    before[0] = 0; /* characters before each word */
    for (int64_t word = 0; word < count; word++)
        before[word + 1] = before[word] + words->items[word].characters;
    uint64_t mask;
    Slot *slots = clear_slots(rules, count, &mask);
    if (!slots)
        return 0;
    for (int64_t word = 0; word + 1 < count; word++)
        count_gram(slots, mask, mix(words->items[word].hash, words->items[word + 1].hash), &grams, (uint32_t)word,
                   occurrences, first_place);
    keep_repeated(&grams, occurrences, first_place);
    for (int n = 2; n <= 10; n++) {
        if (count < n)
            return 0;
        if (n > 2) { /* an n-gram repeats only where both its (n-1)-grams do */
            int64_t pairs = grams.count;
            slots = clear_slots(rules, pairs, &mask);
            if (!slots)
                return 0;
            grams.count = grams.distinct = 0;
            for (int64_t at = 0; at + 1 < pairs; at++)
                if (grams.place[at + 1] == grams.place[at] + 1) {
                    uint64_t key = mix(grams.number[at], (uint64_t)grams.number[at + 1] << 32);
                    count_gram(slots, mask, key, &grams, grams.place[at], occurrences, first_place);
                }
            keep_repeated(&grams, occurrences, first_place);
        }
        if (n <= 4) {
            int64_t characters = before[grams.most_place + n] - before[grams.most_place] + n - 1;
            ABOVE(P_gopher_repetition_max_top_2_gram + n - 2, ratio(characters * grams.most, document->characters));
            continue;
        }
        int64_t repeated = 0, next = 0;
        for (int64_t number = 1; number <= grams.distinct; number++)
            occurrences[number] = 0;
        for (int64_t at = 0; at < grams.count; at++) {
            uint32_t place = grams.place[at];
            if (place < next)
                continue;
            if (occurrences[grams.number[at]]++) {
                repeated += before[place + n] - before[place];
                next = (int64_t)place + n;
            }
        }
        ABOVE(P_gopher_repetition_max_duplicate_5_grams + n - 5, ratio(repeated, document->characters));
    }
    return 0;
}

/* ---- Gopher's quality rules ---- */

/* The line of str.splitlines at `text`; `*next` gets the start of the following one. */
static const uint8_t *end_of_line(const uint8_t *text, const uint8_t *end, const uint8_t **next) {
    for (; text < end; text++) {
        int plain = plain_bytes(text, 0x1F);
        text += plain;
        if (plain == 8) {
            text--;
            continue;
        }
        if (text >= end)
            break;
        uint8_t byte = *text;
        int size = 0;
        if (byte == '\r')
            size = text + 1 < end && text[1] == '\n' ? 2 : 1;
        else if ((byte >= 0x0A && byte <= 0x0C) || (byte >= 0x1C && byte <= 0x1E))
            size = 1;
        else if (byte == 0xC2 && text[1] == 0x85)
            size = 2;
        else if (byte == 0xE2 && text[1] == 0x80 && (text[2] == 0xA8 || text[2] == 0xA9))
            size = 3;
        if (size) {
            *next = text + size;
            return text;
        }
    }
    *next = end;
    return end;
}

static inline bool is_ellipsis(const uint8_t *text) { return text[0] == 0xE2 && text[1] == 0x80 && text[2] == 0xA6; }

static inline bool ends_with(const uint8_t *start, const uint8_t *end, const char *what, int64_t bytes) {
    return end - start >= bytes && !memcmp(end - bytes, what, (size_t)bytes);
}

static int rule_gopher_quality(Document *document) {
    const Words *words = words_of(document);
    WordSums sums = words->rest;
    for (int64_t at = 0; at < words->count; at++)
        add_sums(&sums, words->items[at]);
    int64_t count = sums.words, total = sums.words + sums.symbols;
    BELOW(P_gopher_quality_min_words, (double)count);
    ABOVE(P_gopher_quality_max_words, (double)count);
    if (count) {
        BELOW(P_gopher_quality_min_mean_word_length, ratio(sums.characters, count));
        ABOVE(P_gopher_quality_max_mean_word_length, ratio(sums.characters, count));
    }
    int64_t hashes = 0, ellipses = 0;
    for (const uint8_t *text = document->text; text < document->end; text++)
        hashes += *text == '#';
    for (const uint8_t *text = document->text; (text = memchr(text, '.', (size_t)(document->end - text)));) {
        bool three = document->end - text >= 3 && text[1] == '.' && text[2] == '.';
        ellipses += three;
        text += three ? 3 : 1;
    }
    for (const uint8_t *text = document->text; (text = memchr(text, 0xE2, (size_t)(document->end - text))); text++)
        ellipses += is_ellipsis(text);
    if (total) {
        ABOVE(P_gopher_quality_max_hash_ratio, ratio(hashes, total));
        ABOVE(P_gopher_quality_max_ellipsis_ratio, ratio(ellipses, total));
    }
    int64_t lines = 0, bullets = 0, ellipsis_lines = 0;
    for (const uint8_t *line = document->text, *next; line < document->end; line = next) {
        const uint8_t *end = end_of_line(line, document->end, &next);
        const uint8_t *first = skip_space(line, end), *last = trim_end(first, end);
        lines++;
        bullets += ends_with(first, first + (last - first >= 1), "-", 1) ||
                   (last - first >= 3 && !memcmp(first, "\xE2\x80\xA2", 3));
        ellipsis_lines += ends_with(first, last, "...", 3) || ends_with(first, last, "\xE2\x80\xA6", 3);
    }
    if (lines) {
        ABOVE(P_gopher_quality_max_bullet_lines, ratio(bullets, lines));
        ABOVE(P_gopher_quality_max_ellipsis_lines, ratio(ellipsis_lines, lines));
    }
    if (total)
        BELOW(P_gopher_quality_min_alphabetic_words, ratio(sums.alphabetic, total));
    BELOW(P_gopher_quality_min_stop_words, (double)__builtin_popcount(sums.flags >> WORD_STOP_SHIFT));
    return 0;
}

/* ---- C4 ---- */

static inline uint8_t fold(uint8_t byte) { return byte >= 'A' && byte <= 'Z' ? byte | 32 : byte; }

/* Whether `what` (lower case) occurs, in any case; `rare` is the offset of a rare letter of it. */
static bool occurs(const uint8_t *text, const uint8_t *end, const char *what, int64_t bytes, int64_t rare) {
    enum { BLOCK = 64 };
    if (end - text < bytes)
        return false;
    uint8_t wanted = (uint8_t)what[rare];
    int64_t beside = rare + 1 < bytes ? 1 : -1;
    uint8_t wanted_beside = (uint8_t)what[rare + beside];
    const uint8_t *last = end - bytes + rare + 1; /* past the last place of the rare letter */
    for (text += rare; text < last;) {
        if (last - text >= BLOCK) {
            uint8_t any = 0;
            for (int at = 0; at < BLOCK; at++)
                any |= (uint8_t)((text[at] | 32) == wanted) & (uint8_t)((text[at + beside] | 32) == wanted_beside);
            if (!any) {
                text += BLOCK;
                continue;
            }
        }
        const uint8_t *stop = last - text >= BLOCK ? text + BLOCK : last;
        for (; text < stop; text++) {
            int64_t at = 0;
            while (at < bytes && fold(text[at - rare]) == (uint8_t)what[at])
                at++;
            if (at == bytes)
                return true;
        }
    }
    return false;
}
#define OCCURS(text, end, what, rare) occurs(text, end, what, sizeof(what) - 1, rare)

static bool has_policy(const uint8_t *text, const uint8_t *end) {
    return OCCURS(text, end, "terms of use", 3) || OCCURS(text, end, "privacy policy", 3) ||
           OCCURS(text, end, "cookie policy", 3) || OCCURS(text, end, "uses cookies", 8) ||
           OCCURS(text, end, "use of cookies", 10) || OCCURS(text, end, "use cookies", 7);
}

/* Bytes of the citation mark at `text` ("[12]", "[edit]", "[citation needed]"), 0 where there is none. */
static int64_t citation_at(const uint8_t *text, const uint8_t *end) {
    const uint8_t *at = text + 1;
    while (at < end && is_digit(*at))
        at++;
    if (at < end && *at == ']')
        return at + 1 - text;
    if (end - text >= 6 && !memcmp(text, "[edit]", 6))
        return 6;
    return end - text >= 17 && !memcmp(text, "[citation needed]", 17) ? 17 : 0;
}

/* Copies a line without its citation marks; returns its new end. */
static uint8_t *without_citations(const uint8_t *text, const uint8_t *end, uint8_t *output) {
    while (text < end) {
        int64_t mark = *text == '[' ? citation_at(text, end) : 0;
        if (mark)
            text += mark;
        else
            *output++ = *text++;
    }
    return output;
}

/* spaCy's sentencizer: a sentence starts at the first word that is no punctuation behind an end mark. */
static int64_t count_sentences(const Word *words, int64_t count) {
    int64_t sentences = count > 0;
    bool ended = false;
    for (int64_t at = 0; at < count; at++) {
        if (words[at].flags & WORD_ENDS_SENTENCE)
            ended = true;
        else if (ended && !(words[at].flags & WORD_PUNCTUATION)) {
            sentences++;
            ended = false;
        }
    }
    return sentences;
}

static int rule_c4(Document *document) {
    Rules *rules = document->rules;
    const double *parameters = document->parameters;
    const uint8_t *text = document->text, *end = document->end;
    bool lorem = parameters[P_c4_lorem_ipsum] > 0 && OCCURS(text, end, "lorem ipsum", 7);
    bool javascript = parameters[P_c4_javascript] > 0 && OCCURS(text, end, "javascript", 0);
    bool policy = parameters[P_c4_policy] > 0 && has_policy(text, end);
    bool bracket = parameters[P_c4_curly_bracket] > 0 && memchr(text, '{', (size_t)(end - text));
    bool citations = parameters[P_c4_citations] > 0;
    bool punctuation = parameters[P_c4_terminal_punctuation] > 0;
    double longest = parameters[P_c4_max_word_length], fewest = parameters[P_c4_min_words_per_line];
    bool counts_sentences = !isnan(parameters[P_c4_min_sentences]);
    int64_t sentences = 0, counts[LINE_COUNTS] = {0};
    if (!reserve(rules, (void **)&rules->line, &rules->line_capacity, end - text + PADDING, 1) ||
        (!document->edited && !reserve(rules, (void **)&rules->text, &rules->text_capacity, end - text + PADDING, 1)))
        return 0;
    uint8_t *output = rules->text; /* never ahead of what is read, should the rule have run before */
    for (const uint8_t *next; text < end; text = next) {
        const uint8_t *line = text, *last = end_of_line(text, end, &next);
        line = skip_space(line, last);
        last = trim_end(line, last);
        int64_t words = 0;
        bool too_long = false;
        for (const uint8_t *at = line; at < last; words++) {
            const uint8_t *word = at;
            at = end_of_chunk(at, last);
            too_long = too_long || ((double)(at - word) > longest && (double)characters_of(word, at) > longest);
            at = skip_space(at, last);
        }
        if (too_long) {
            counts[LINES_LONG_WORD]++;
            continue;
        }
        if (citations && memchr(line, '[', (size_t)(last - line))) {
            uint8_t *shortened = without_citations(line, last, rules->line);
            memset(shortened, 0, PADDING);
            line = rules->line;
            last = shortened;
        }
        if (punctuation && (line == last || !strchr(".?!\"'", last[-1]) || !last[-1] || ends_with(line, last, "...", 3))) {
            counts[LINES_PUNCTUATION]++;
            continue;
        }
        if ((double)words < fewest) {
            counts[LINES_FEW_WORDS]++;
            continue;
        }
        if (lorem && OCCURS(line, last, "lorem ipsum", 7)) {
            document->value = 1;
            return P_c4_lorem_ipsum + 1;
        }
        if (javascript && OCCURS(line, last, "javascript", 0)) {
            counts[LINES_JAVASCRIPT]++;
            continue;
        }
        if (bracket && memchr(line, '{', (size_t)(last - line))) {
            document->value = 1;
            return P_c4_curly_bracket + 1;
        }
        if (policy && has_policy(line, last)) {
            counts[LINES_POLICY]++;
            continue;
        }
        if (counts_sentences) {
            if (!split_words(rules, line, last, &rules->line_words))
                return 0;
            sentences += count_sentences(rules->line_words.items, rules->line_words.count);
        }
        counts[LINES_KEPT]++;
        if (counts[LINES_KEPT] > 1)
            *output++ = '\n';
        memmove(output, line, (size_t)(last - line));
        output += last - line;
    }
    BELOW(P_c4_min_sentences, (double)sentences);
    for (int at = 0; at < LINE_COUNTS; at++)
        document->line_counts[at] += counts[at];
    memset(output, 0, PADDING);
    const uint8_t *kept = skip_space(rules->text, output), *kept_end = trim_end(kept, output);
    bool changed = kept_end - kept != document->end - document->text ||
                   (!document->edited && memcmp(kept, document->text, (size_t)(kept_end - kept)));
    if (changed || document->edited) {
        document->text = kept;
        document->end = kept_end;
        document->edited = true;
        document->characters = characters_of(kept, kept_end);
        rules->has_words = false;
    }
    return 0;
}

/* ---- FineWeb ---- */

static int rule_fineweb(Document *document) {
    Rules *rules = document->rules;
    const double *parameters = document->parameters;
    int64_t lines = 0, terminal = 0, brief = 0, newlines = 0;
    double brief_length = parameters[P_fineweb_short_line_length];
    for (const uint8_t *line = document->text;; newlines++) {
        const uint8_t *end = memchr(line, '\n', (size_t)(document->end - line));
        const uint8_t *last = end ? end : document->end;
        if (skip_space(line, last) < last) {
            int length;
            uint32_t code = code_point(last_point(line, last), &length);
            lines++;
            terminal += IN(terminal_punctuation, code);
            brief += (double)(last - line) <= brief_length || (double)(last - line) <= 4 * brief_length
                         ? (double)characters_of(line, last) <= brief_length
                         : 0;
        }
        if (!end)
            break;
        line = end + 1;
    }
    if (!lines) {
        BELOW(P_fineweb_min_terminal_punctuation_lines, 0);
        return 0;
    }
    BELOW(P_fineweb_min_terminal_punctuation_lines, ratio(terminal, lines));
    ABOVE(P_fineweb_max_short_lines, ratio(brief, lines));
    Repetition repeated = repetition(rules, document->text, document->end, PIECE_FILLED_LINES);
    ABOVE(P_fineweb_max_duplicate_line_characters,
          ratio(repeated.duplicate_characters, document->characters - newlines));
    const Words *words = words_of(document);
    int64_t count = words->count + words->rest.words + words->rest.symbols;
    if (count)
        ABOVE(P_fineweb_max_newlines_per_word, ratio(newlines, count));
    return 0;
}

/* ---- for Python ---- */

int64_t rules_line_counts(void) { return LINE_COUNTS; }
int64_t rules_padding(void) { return PADDING; }

/* "rule.parameter" of every parameter, a line each. */
const char *rules_parameters(void) {
#define NAME(rule, parameter) #rule "." #parameter "\n"
    return PARAMETERS(NAME);
#undef NAME
}

static bool has_affix(Rules *rules, const uint8_t *text, int64_t bytes) {
    uint32_t point[64], at[65];
    int64_t count = decode(text, bytes, point, at);
    Chunk chunk = {text, point, at};
    bool found = prefix_of(rules, chunk, 0, count) || suffix_of(rules, chunk, 0, count);
    for (int64_t from = 0; from < count && !found; from++)
        found = infix_at(rules, chunk, 0, count, from) != from;
    return found;
}

/* What rules_apply needs between calls; NULL when memory is short. */
Rules *rules_new(void) {
    Rules *rules = calloc(1, sizeof(Rules));
    if (!rules)
        return NULL;
    for (uint32_t code = 0; code < ASCII; code++) {
        rules->ascii_symbol[code] = IN(word_symbols, code);
        rules->ascii_affix[code] = IN(affix_punctuation, code);
        rules->ascii_quote[code] = IN(quotes, code);
    }
    uint32_t splits = 0;
    for (size_t word = 0; word < COUNT(special_words); word++) {
        uint8_t joined[64 + PADDING] = {0};
        int bytes = 0;
        Special special = {0, splits, 0, 1, false};
        rules->splits[splits] = 0;
        for (const char *at = special_words[word]; *at; at++) {
            if (*at == '\x01') {
                special.parts++;
                rules->splits[++splits] = 0;
                continue;
            }
            joined[bytes++] = (uint8_t)*at;
            rules->splits[splits]++;
        }
        splits++;
        special.bytes = (uint8_t)bytes;
        special.hash = hash_bytes(joined, bytes);
        special.merges = has_affix(rules, joined, bytes);
        if (bytes > rules->longest_special)
            rules->longest_special = bytes;
        uint32_t at = special.hash & (SPECIAL_SLOTS - 1);
        while (rules->specials[at].parts)
            at = (at + 1) & (SPECIAL_SLOTS - 1);
        rules->specials[at] = special;
    }
    for (size_t stop = 0; stop < COUNT(stop_words); stop++) {
        uint8_t padded[8 + PADDING] = {0};
        memcpy(padded, stop_words[stop], strlen(stop_words[stop]));
        rules->stop_hashes[stop] = hash_bytes(padded, (int64_t)strlen(stop_words[stop]));
    }
    return rules;
}

void rules_free(Rules *rules) {
    if (!rules)
        return;
    free(rules->words.items);
    free(rules->line_words.items);
    free(rules->slots);
    free(rules->numbers);
    free(rules->points);
    free(rules->text);
    free(rules->line);
    free(rules);
}

/* Applies `order` [order_count] to every document. text: the documents one after the other, offsets [count + 1], PADDING
   readable bytes behind the last. reason [count]: 0 kept, else 1 + the parameter that dropped it; value [count]: what was
   measured there. edited [count]: whether its text has changed; output (as long as the texts) and output_offsets
   [count + 1]: the changed texts. line_counts [LINE_COUNTS] is added to. Returns 0, or -1 when memory is short. */
int rules_apply(Rules *rules, const uint8_t *text, const int64_t *offsets, int64_t count, const int32_t *order,
                int32_t order_count, const double *parameters, int32_t *reason, double *value, uint8_t *edited,
                uint8_t *output, int64_t *output_offsets, int64_t *line_counts) {
    static int (*const functions[])(Document *) = {rule_length,         rule_symbol_ratio, rule_gopher_repetition,
                                                   rule_gopher_quality, rule_c4,           rule_fineweb};
    int64_t written = 0;
    rules->failed = false;
    for (int64_t at = 0; at < count; at++) {
        const uint8_t *start = text + offsets[at], *end = text + offsets[at + 1];
        Document document = {rules, parameters, start, end, false, characters_of(start, end), 0, line_counts};
        rules->has_words = false;
        reason[at] = 0;
        for (int32_t rule = 0; rule < order_count && !reason[at]; rule++)
            reason[at] = functions[order[rule]](&document);
        value[at] = document.value;
        edited[at] = document.edited && !reason[at];
        output_offsets[at] = written;
        if (edited[at]) {
            memcpy(output + written, document.text, (size_t)(document.end - document.text));
            written += document.end - document.text;
        }
        if (rules->failed)
            return -1;
    }
    output_offsets[count] = written;
    return 0;
}

/* The words of one text, for tests: their lengths in characters [at most `most`]; returns how many there are. */
int64_t rules_words(Rules *rules, const uint8_t *text, int64_t bytes, uint32_t *characters, int64_t most) {
    if (!split_words(rules, text, text + bytes, &rules->words))
        return -1;
    for (int64_t at = 0; at < rules->words.count && at < most; at++)
        characters[at] = rules->words.items[at].characters;
    return rules->words.count;
}
