/* Duplicates among documents: normalized texts, MinHash bands, n-grams, union-find.

Texts come as one buffer of valid UTF-8 and offsets [documents + 1] into it. A document's words are what lies between
white space, control characters and the punctuation of `make_fold_table.py`, in lower case and without diacritics
(nonspacing marks); a number, with one decimal separator between digits, counts as "0". Where `characters` is set, every
letter of a script that is written without spaces is a word. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fold_table.h"
#include "unicode_table.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

#define SHINGLES_AT_ONCE 1024
#define EXACT_MARK (UINT64_C(1) << 63)

/* The finalizer of MurmurHash3 (Appleby): every bit of the result depends on every bit of the value. */
static inline uint64_t mixed(uint64_t value) {
    value ^= value >> 33;
    value *= UINT64_C(0xff51afd7ed558ccd);
    value ^= value >> 33;
    value *= UINT64_C(0xc4ceb9fe1a85ec53);
    value ^= value >> 33;
    return value;
}

static inline int put(uint8_t *out, uint32_t code) {
    if (code < 0x80) {
        out[0] = (uint8_t)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (uint8_t)(0xC0 | code >> 6);
        out[1] = (uint8_t)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (uint8_t)(0xE0 | code >> 12);
        out[1] = (uint8_t)(0x80 | (code >> 6 & 0x3F));
        out[2] = (uint8_t)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (uint8_t)(0xF0 | code >> 18);
    out[1] = (uint8_t)(0x80 | (code >> 12 & 0x3F));
    out[2] = (uint8_t)(0x80 | (code >> 6 & 0x3F));
    out[3] = (uint8_t)(0x80 | (code & 0x3F));
    return 4;
}

/* Texts in lower case (one code point for one), runs of white space as one space, none at either end.

out: room for twice the bytes of the texts. out_offsets [documents + 1]. */
void normalize(const uint8_t *text, const int64_t *offsets, int64_t documents, uint8_t *out, int64_t *out_offsets) {
    uint8_t ascii[128];
    for (int code = 0; code < 128; code++) {
        ascii[code] = class_of((uint32_t)code) & CLASS_SPACE ? ' ' : (uint8_t)lower_of((uint32_t)code);
    }
    int64_t size = 0;
    out_offsets[0] = 0;
    for (int64_t document = 0; document < documents; document++) {
        const int64_t start = size;
        int spaced = 1; /* a space would follow a space, or begin the text */
        for (int64_t at = offsets[document]; at < offsets[document + 1];) {
            if (text[at] < 0x80) {
                const uint8_t character = ascii[text[at++]];
                out[size] = character;
                size += !(spaced && character == ' ');
                spaced = character == ' ';
                continue;
            }
            int length;
            const uint32_t code = code_point(text + at, &length);
            at += length;
            const int space = class_of(code) & CLASS_SPACE;
            if (space && spaced) {
                continue;
            }
            size += put(out + size, space ? ' ' : lower_of(code));
            spaced = space != 0;
        }
        size -= size > start && out[size - 1] == ' ';
        out_offsets[document + 1] = size;
    }
}

/* Where a document's words are read. */
typedef struct {
    const uint8_t *text;
    int64_t at, end;
    int characters;
    uint8_t ascii[128]; /* the folded character, 0 where it is no part of a word */
} Words;

typedef struct {
    uint64_t hash;
    int64_t start, end; /* bytes */
    int letters;        /* whether it is more than a number */
} Word;

static void words_init(Words *words, const uint8_t *text, int characters) {
    words->text = text;
    words->characters = characters;
    for (uint32_t code = 0; code < 128; code++) {
        const uint32_t character = fold_of(code);
        words->ascii[code] = character == ' ' ? 0 : (uint8_t)character;
    }
}

/* The folded character at `at`, 0 for none of a word and UINT32_MAX for a diacritic; `*length` gets its bytes. */
static inline uint32_t folded(const Words *words, int64_t at, int *length, int *unspaced) {
    const uint8_t first = words->text[at];
    *unspaced = 0;
    if (first < 0x80) {
        *length = 1;
        return words->ascii[first];
    }
    const uint32_t code = code_point(words->text + at, length);
    const uint32_t character = fold_of(code);
    if (character == ' ') {
        return 0;
    }
    *unspaced = words->characters && (class_of(code) & (CLASS_UNSPACED | CLASS_ALPHA)) == (CLASS_UNSPACED | CLASS_ALPHA);
    return character ? character : UINT32_MAX;
}

static inline int is_digit(const Words *words, int64_t at, int *length) {
    int unspaced;
    return at < words->end && folded(words, at, length, &unspaced) == '0';
}

static inline int64_t after_digits(const Words *words, int64_t at) {
    int length;
    while (is_digit(words, at, &length)) {
        at += length;
    }
    return at;
}

/* Past the digits, at most one of . , U+060C U+066B U+2396 U+2397 U+2398 among them, that begin at `at`. */
static inline int64_t after_number(const Words *words, int64_t at) {
    at = after_digits(words, at);
    if (at >= words->end) {
        return at;
    }
    int length, of_digit;
    const uint32_t code = code_point(words->text + at, &length);
    const int separator =
        code == '.' || code == ',' || code == 0x60C || code == 0x66B || (code >= 0x2396 && code <= 0x2398);
    return separator && is_digit(words, at + length, &of_digit) ? after_digits(words, at + length) : at;
}

/* Reads the next word; 0 when there is none. */
static inline int next_word(Words *words, Word *word) {
    int length, unspaced;
    uint32_t character = 0;
    int64_t at = words->at;
    for (; at < words->end; at += length) {
        character = folded(words, at, &length, &unspaced);
        if (character && character != UINT32_MAX) {
            break;
        }
    }
    if (at >= words->end) {
        words->at = at;
        return 0;
    }
    uint64_t hash = UINT64_C(0x9e3779b97f4a7c15);
    word->start = at;
    word->letters = 0;
    for (;;) {
        if (character != UINT32_MAX) {
            hash = (hash ^ character) * UINT64_C(0xd6e8feb86659fd93);
        }
        if (character == '0') {
            at = after_number(words, at);
        } else {
            word->letters |= character != UINT32_MAX;
            at += length;
        }
        if (unspaced) {
            break;
        }
        if (at >= words->end) {
            break;
        }
        character = folded(words, at, &length, &unspaced);
        if (!character || unspaced) {
            break;
        }
    }
    word->hash = mixed(hash);
    word->end = words->at = at;
    return 1;
}

/* The n-grams of a document as they pass: a polynomial in the hashes of their words. */
typedef struct {
    int64_t size, count;
    int letters;
    uint64_t hash, oldest; /* the factor of the word that leaves */
    Word *ring;
} Ngrams;

#define NGRAM_BASE UINT64_C(0x9fb21c651e98df25)

static int ngrams_init(Ngrams *ngrams, int64_t size) {
    ngrams->size = size;
    ngrams->ring = malloc((size_t)size * sizeof(Word));
    ngrams->oldest = 1;
    for (int64_t i = 1; i < size; i++) {
        ngrams->oldest *= NGRAM_BASE;
    }
    return ngrams->ring != NULL;
}

static inline void ngrams_restart(Ngrams *ngrams) {
    ngrams->count = 0;
    ngrams->letters = 0;
    ngrams->hash = 0;
}

/* Takes a word; 1 when it completes an n-gram, which `*hash` then gets. */
static inline int ngrams_add(Ngrams *ngrams, const Word *word, int64_t *place, uint64_t *hash) {
    Word *slot = ngrams->ring + *place;
    if (ngrams->count >= ngrams->size) {
        ngrams->hash -= slot->hash * ngrams->oldest;
        ngrams->letters -= slot->letters;
    }
    *slot = *word;
    *place = *place + 1 == ngrams->size ? 0 : *place + 1;
    ngrams->hash = ngrams->hash * NGRAM_BASE + word->hash;
    ngrams->letters += word->letters;
    ngrams->count++;
    *hash = mixed(ngrams->hash);
    return ngrams->count >= ngrams->size;
}

/* minima[p] = min(minima[p], (multipliers[p] * x + increments[p]) >> 32 over the shingles x), modulo 2^64.

Multiply-shift with 64 random bits for keys of 32 is strongly universal (Dietzfelbinger 1996; Thorup, "High speed
hashing for integers and strings", section 3.3). */
VECTORIZED
static void take_minima(const uint32_t *restrict shingles, int64_t count, const uint64_t *restrict multipliers,
                        const uint64_t *restrict increments, int64_t permutations, uint32_t *restrict minima) {
    for (int64_t p = 0; p < permutations; p++) {
        const uint32_t low = (uint32_t)multipliers[p], high = (uint32_t)(multipliers[p] >> 32);
        const uint64_t increment = increments[p];
        uint32_t minimum = minima[p];
        for (int64_t i = 0; i < count; i++) {
            const uint32_t hash =
                (uint32_t)(((uint64_t)low * shingles[i] + increment) >> 32) + high * shingles[i];
            minimum = hash < minimum ? hash : minimum;
        }
        minima[p] = minimum;
    }
}

/* MinHash of the sets of word n-grams; scripts without spaces have the words that datatrove's English gives them.

multipliers, increments [bands * rows]; band_hashes [documents, bands]; sketches [documents, (bands * rows + 7) / 8], a
bit a permutation; ngrams [documents], 0 where a document has fewer than `size` words: its other results are zeros.
Returns 0, or -1 without memory. */
int minhash(const uint8_t *text, const int64_t *offsets, int64_t documents, int64_t size, int64_t bands, int64_t rows,
            const uint64_t *multipliers, const uint64_t *increments, uint64_t *band_hashes, uint8_t *sketches,
            int64_t *ngram_counts) {
    const int64_t permutations = bands * rows, sketch_bytes = (permutations + 7) / 8;
    Ngrams ngrams;
    Words words;
    uint32_t shingles[SHINGLES_AT_ONCE];
    uint32_t *minima = malloc((size_t)permutations * sizeof(uint32_t));
    if (!ngrams_init(&ngrams, size) || !minima) {
        free(ngrams.ring);
        free(minima);
        return -1;
    }
    words_init(&words, text, 0);
    memset(band_hashes, 0, (size_t)(documents * bands) * sizeof(uint64_t));
    memset(sketches, 0, (size_t)(documents * sketch_bytes));
    for (int64_t document = 0; document < documents; document++) {
        Word word;
        int64_t place = 0, pending = 0, total = 0;
        uint64_t hash;
        words.at = offsets[document];
        words.end = offsets[document + 1];
        ngrams_restart(&ngrams);
        memset(minima, 0xFF, (size_t)permutations * sizeof(uint32_t));
        while (next_word(&words, &word)) {
            if (!ngrams_add(&ngrams, &word, &place, &hash)) {
                continue;
            }
            shingles[pending++] = (uint32_t)hash;
            if (pending == SHINGLES_AT_ONCE) {
                take_minima(shingles, pending, multipliers, increments, permutations, minima);
                total += pending;
                pending = 0;
            }
        }
        take_minima(shingles, pending, multipliers, increments, permutations, minima);
        total += pending;
        ngram_counts[document] = total;
        if (!total) {
            continue;
        }
        for (int64_t band = 0; band < bands; band++) {
            uint64_t of_band = mixed((uint64_t)band + 1);
            for (int64_t row = 0; row < rows; row++) {
                of_band = mixed(of_band ^ minima[band * rows + row]);
            }
            band_hashes[document * bands + band] = of_band;
        }
        for (int64_t p = 0; p < permutations; p++) {
            sketches[document * sketch_bytes + p / 8] |= (uint8_t)((minima[p] & 1) << p % 8);
        }
    }
    free(ngrams.ring);
    free(minima);
    return 0;
}

/* Hashes of the n-grams, `characters` set, in which at least half of the words are more than numbers.

hashes: room for `capacity`; word_counts [documents]. Returns how many there are, at most `capacity`; -1 without
memory. */
int64_t ngram_hashes(const uint8_t *text, const int64_t *offsets, int64_t documents, int64_t size, uint64_t *hashes,
                     int64_t capacity, int64_t *word_counts) {
    Ngrams ngrams;
    Words words;
    int64_t count = 0;
    if (!ngrams_init(&ngrams, size)) {
        return -1;
    }
    words_init(&words, text, 1);
    for (int64_t document = 0; document < documents; document++) {
        Word word;
        int64_t place = 0;
        uint64_t hash;
        words.at = offsets[document];
        words.end = offsets[document + 1];
        ngrams_restart(&ngrams);
        while (next_word(&words, &word)) {
            if (ngrams_add(&ngrams, &word, &place, &hash) && 2 * ngrams.letters >= size && count < capacity) {
                hashes[count++] = hash;
            }
        }
        word_counts[document] = ngrams.count;
    }
    free(ngrams.ring);
    return count;
}

/* Puts hashes into an open-addressed table [2^bits] of zeros, bits > 0, more places than hashes; 0 stands for 1. */
void fill_table(const uint64_t *hashes, int64_t count, uint64_t *table, int bits) {
    const uint64_t mask = (UINT64_C(1) << bits) - 1;
    for (int64_t i = 0; i < count; i++) {
        const uint64_t hash = hashes[i] ? hashes[i] : 1;
        uint64_t place = hash >> (64 - bits);
        while (table[place] && table[place] != hash) {
            place = (place + 1) & mask;
        }
        table[place] = hash;
    }
}

/* Looks up every n-gram of the documents in a table of `fill_table`.

matches [documents]: n-grams found, counted up to `enough`; spans [documents, 2]: bytes of the first of them, from the
start of the document. Returns 0, or -1 without memory. */
int find_ngrams(const uint8_t *text, const int64_t *offsets, int64_t documents, int64_t size, const uint64_t *table,
                int bits, int64_t enough, int64_t *matches, int64_t *spans) {
    const uint64_t mask = (UINT64_C(1) << bits) - 1;
    Ngrams ngrams;
    Words words;
    if (!ngrams_init(&ngrams, size)) {
        return -1;
    }
    words_init(&words, text, 1);
    for (int64_t document = 0; document < documents; document++) {
        Word word;
        int64_t place = 0;
        uint64_t hash;
        words.at = offsets[document];
        words.end = offsets[document + 1];
        matches[document] = spans[2 * document] = spans[2 * document + 1] = 0;
        ngrams_restart(&ngrams);
        while (matches[document] < enough && next_word(&words, &word)) {
            if (!ngrams_add(&ngrams, &word, &place, &hash)) {
                continue;
            }
            hash = hash ? hash : 1;
            uint64_t slot = hash >> (64 - bits);
            while (table[slot] && table[slot] != hash) {
                slot = (slot + 1) & mask;
            }
            if (table[slot] && !matches[document]++) {
                spans[2 * document] = ngrams.ring[place].start - offsets[document];
                spans[2 * document + 1] = word.end - offsets[document];
            }
        }
    }
    free(ngrams.ring);
    return 0;
}

/* Clusters are trees: parents [documents] holds the parent's number + 1, 0 for a root, and EXACT_MARK where the link
was made of exact duplicates. A root is the lowest number of its cluster. */
static inline uint64_t root_of(uint64_t *parents, uint64_t document) {
    for (;;) {
        const uint64_t above = parents[document] & ~EXACT_MARK;
        if (!above) {
            return document;
        }
        const uint64_t higher = parents[above - 1] & ~EXACT_MARK;
        if (!higher) {
            return above - 1;
        }
        parents[document] = (parents[document] & EXACT_MARK) | higher; /* path halving */
        document = higher - 1;
    }
}

/* Joins the clusters of every pair [count, 2]; -1 when a number is not below `documents`, 0 otherwise. */
int unite(uint64_t *parents, int64_t documents, const uint64_t *pairs, int64_t count, int exact) {
    for (int64_t i = 0; i < count; i++) {
        if (pairs[2 * i] >= (uint64_t)documents || pairs[2 * i + 1] >= (uint64_t)documents) {
            return -1;
        }
        const uint64_t a = root_of(parents, pairs[2 * i]), b = root_of(parents, pairs[2 * i + 1]);
        if (a != b) {
            parents[a < b ? b : a] = ((a < b ? a : b) + 1) | (exact ? EXACT_MARK : 0);
        }
    }
    return 0;
}

/* The documents from `start` on, `count` of them, that are not the first of their clusters: their numbers, roots and
whether they are exact duplicates [count]. Counts each in sizes[root] [documents]. Returns how many there are. */
int64_t list_duplicates(uint64_t *parents, int64_t start, int64_t count, uint64_t *numbers, uint64_t *roots,
                        uint8_t *exact, uint32_t *sizes) {
    int64_t found = 0;
    for (int64_t document = start; document < start + count; document++) {
        if (parents[document]) {
            numbers[found] = (uint64_t)document;
            roots[found] = root_of(parents, (uint64_t)document);
            exact[found] = (parents[document] & EXACT_MARK) != 0;
            sizes[roots[found++]]++;
        }
    }
    return found;
}
