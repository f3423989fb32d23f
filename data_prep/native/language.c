/* fastText's supervised prediction (Joulin et al. 2016): the mean of the vectors of a text's words and of their
   character n-grams, then a walk down the Huffman tree of the labels. data_prep/language.py reads the model file.

A word always adds the same vectors, so their sum is looked up in a cache. Sums are in another order than fastText's,
which changes probabilities by about a millionth. Texts are followed by PADDING readable bytes. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PADDING 16
#define DIMENSIONS 16 /* of lid.176 */
#define CACHE_SLOTS (1u << 14)
#define LONGEST_WORD 1024

typedef struct {
    uint64_t key;
    uint32_t count;
    float sum[DIMENSIONS];
} CachedWord;

typedef struct {
    uint32_t words, buckets, smallest, largest; /* rows of words come first; lengths of the character n-grams */
    const float *rows;                          /* [words + kept buckets, DIMENSIONS] */
    const uint64_t *word_keys;                  /* open addressing, 0 is empty [word_mask + 1] */
    const int32_t *word_rows;
    uint64_t word_mask;
    const int32_t *bucket_keys; /* bucket + 1, 0 is empty [bucket_mask + 1] */
    const int32_t *bucket_rows;
    uint64_t bucket_mask;
    int32_t end_row; /* of the end of line, -1 without */
    int32_t labels;
    const int32_t *left, *right; /* children of the tree's nodes [2 labels - 1]; leaves are the labels */
    const float *output;         /* [labels - 1, DIMENSIONS] */
    CachedWord *cache;
} Model;

/* FNV-1a as fastText has it, in 64 bits too for keys of whole words. */
static inline uint32_t fnv32(uint32_t hash, uint8_t byte) { return (hash ^ (uint32_t)(int8_t)byte) * 16777619u; }

uint64_t language_key(const uint8_t *word, int64_t bytes) {
    uint64_t hash = 14695981039346656037u;
    for (int64_t at = 0; at < bytes; at++)
        hash = (hash ^ word[at]) * 1099511628211u;
    hash ^= hash >> 32;
    return hash ? hash : 1;
}

static inline void add_row(const Model *model, int64_t row, float *sum, uint32_t *count) {
    const float *vector = model->rows + row * DIMENSIONS;
    for (int at = 0; at < DIMENSIONS; at++)
        sum[at] += vector[at];
    ++*count;
}

static void add_grams(const Model *model, const uint8_t *word, int64_t bytes, float *sum, uint32_t *count) {
    for (int64_t start = 0; start < bytes; start++) {
        if ((word[start] & 0xC0) == 0x80)
            continue;
        uint32_t hash = 2166136261u;
        int64_t end = start;
        for (uint32_t n = 1; end < bytes && n <= model->largest; n++) {
            do
                hash = fnv32(hash, word[end++]);
            while (end < bytes && (word[end] & 0xC0) == 0x80);
            if (n < model->smallest || (n == 1 && (start == 0 || end == bytes)))
                continue;
            int32_t bucket = (int32_t)(hash % model->buckets) + 1;
            uint64_t at = (uint64_t)(uint32_t)bucket * 0x9E3779B97F4A7C15u >> 40 & model->bucket_mask;
            while (model->bucket_keys[at] && model->bucket_keys[at] != bucket)
                at = (at + 1) & model->bucket_mask;
            if (model->bucket_keys[at])
                add_row(model, (int64_t)model->words + model->bucket_rows[at], sum, count);
        }
    }
}

static void add_word(const Model *model, const uint8_t *word, int64_t bytes, CachedWord *found) {
    uint64_t at = found->key & model->word_mask;
    while (model->word_keys[at] && model->word_keys[at] != found->key)
        at = (at + 1) & model->word_mask;
    memset(found->sum, 0, sizeof(found->sum));
    found->count = 0;
    if (model->word_keys[at])
        add_row(model, model->word_rows[at], found->sum, &found->count);
    else if (bytes >= 9 && !memcmp(word, "__label__", 9))
        return;
    uint8_t marked[LONGEST_WORD + 2];
    uint8_t *text = bytes <= LONGEST_WORD ? marked : malloc((size_t)bytes + 2);
    if (!text)
        return;
    text[0] = '<';
    memcpy(text + 1, word, (size_t)bytes);
    text[bytes + 1] = '>';
    add_grams(model, text, bytes + 2, found->sum, &found->count);
    if (text != marked)
        free(text);
}

static inline bool is_separator(uint8_t byte) { return byte == ' ' || (byte >= 9 && byte <= 13) || byte == 0; }

static uint32_t hidden_of(Model *model, const uint8_t *text, const uint8_t *end, float *hidden) {
    uint64_t count = 0;
    double total[DIMENSIONS] = {0};
    while (text < end) {
        if (is_separator(*text)) {
            text++;
            continue;
        }
        const uint8_t *word = text;
        uint64_t key = 14695981039346656037u;
        for (; text < end && !is_separator(*text); text++)
            key = (key ^ *text) * 1099511628211u;
        key ^= key >> 32;
        key = key ? key : 1;
        CachedWord *cached = &model->cache[key >> 7 & (CACHE_SLOTS - 1)];
        if (cached->key != key) {
            cached->key = key;
            add_word(model, word, text - word, cached);
        }
        count += cached->count;
        for (int at = 0; at < DIMENSIONS; at++)
            total[at] += cached->sum[at];
    }
    if (model->end_row >= 0) {
        count++;
        for (int at = 0; at < DIMENSIONS; at++)
            total[at] += model->rows[(int64_t)model->end_row * DIMENSIONS + at];
    }
    for (int at = 0; at < DIMENSIONS; at++)
        hidden[at] = count ? (float)(total[at] / (double)count) : 0;
    return count > 0;
}

/* The most probable leaf below `node`, a branch only while it can still win. */
static void descend(const Model *model, const float *hidden, int32_t node, double score, int32_t *best, double *most) {
    if (score <= *most)
        return;
    if (model->left[node] < 0) {
        *best = node;
        *most = score;
        return;
    }
    const float *vector = model->output + (int64_t)(node - model->labels) * DIMENSIONS;
    float product = 0;
    for (int at = 0; at < DIMENSIONS; at++)
        product += vector[at] * hidden[at];
    double right = 1.0 / (1.0 + exp(-(double)product));
    double to_left = score + log(1.0 - right + 1e-5), to_right = score + log(right + 1e-5);
    int32_t first = right > 0.5 ? model->right[node] : model->left[node];
    int32_t second = right > 0.5 ? model->left[node] : model->right[node];
    descend(model, hidden, first, right > 0.5 ? to_right : to_left, best, most);
    descend(model, hidden, second, right > 0.5 ? to_left : to_right, best, most);
}

/* Label and log probability of every text; label -1 where a text has nothing to go by. */
void language_predict(Model *model, const uint8_t *text, const int64_t *offsets, int64_t count, int32_t *label,
                      double *score) {
    for (int64_t at = 0; at < count; at++) {
        float hidden[DIMENSIONS];
        label[at] = -1;
        score[at] = -INFINITY;
        if (hidden_of(model, text + offsets[at], text + offsets[at + 1], hidden))
            descend(model, hidden, 2 * model->labels - 2, 0, &label[at], &score[at]);
    }
}

/* numbers: words, buckets, smallest, largest, word_mask, bucket_mask, end_row, labels. The arrays stay the caller's. */
Model *language_new(const int64_t *numbers, const float *rows, const uint64_t *word_keys, const int32_t *word_rows,
                    const int32_t *bucket_keys, const int32_t *bucket_rows, const int32_t *left, const int32_t *right,
                    const float *output) {
    Model *model = calloc(1, sizeof(Model));
    if (!model)
        return NULL;
    *model = (Model){
        .words = (uint32_t)numbers[0],
        .buckets = (uint32_t)numbers[1],
        .smallest = (uint32_t)numbers[2],
        .largest = (uint32_t)numbers[3],
        .rows = rows,
        .word_keys = word_keys,
        .word_rows = word_rows,
        .word_mask = (uint64_t)numbers[4],
        .bucket_keys = bucket_keys,
        .bucket_rows = bucket_rows,
        .bucket_mask = (uint64_t)numbers[5],
        .end_row = (int32_t)numbers[6],
        .labels = (int32_t)numbers[7],
        .left = left,
        .right = right,
        .output = output,
        .cache = calloc(CACHE_SLOTS, sizeof(CachedWord)),
    };
    if (!model->cache) {
        free(model);
        return NULL;
    }
    return model;
}

void language_free(Model *model) {
    if (model)
        free(model->cache);
    free(model);
}

int64_t language_dimensions(void) { return DIMENSIONS; }
