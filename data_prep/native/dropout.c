/* Dropout whose random numbers are a function of a key and the element's place, for training on CPUs: of a tensor, and
of the probabilities of attention in the same pass as their softmax. Nothing is kept of them for the backward pass, which
computes them again. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define BLOCK 1024 /* elements of a tensor under one key */

/* SplitMix64's finalizer, as in data_prep/randomness.py. */
static inline uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
    return value ^ (value >> 31);
}

/* 32 random bits of column `column` of a row: the hash "lowbias32" (Wellons 2018, "Prospecting for Hash Functions") under
a key of 64 bits that is itself a hash of the row. */
static inline uint32_t random_bits(uint64_t row_key, uint32_t column) {
    uint32_t bits = (column * UINT32_C(0x9E3779B9)) ^ (uint32_t)row_key;
    bits = (bits ^ (bits >> 16)) * UINT32_C(0x7FEB352D);
    bits = ((bits ^ (bits >> 15)) + (uint32_t)(row_key >> 32)) * UINT32_C(0x846CA68B);
    return bits ^ (bits >> 16);
}

static inline uint64_t row_key_of(uint64_t key, uint64_t row) {
    return mixed(key + (row + 1) * UINT64_C(0x9E3779B97F4A7C15));
}

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bfloat16(uint16_t value) { return of_bits((uint32_t)value << 16); }

/* Rounds to nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* 2^value for value <= 0, below 2^-126: 2^-126. Taylor's polynomial of degree 6 on [-1/2, 1/2]: 1.2e-7 relative. */
static inline float exp2_of(float value) {
    value = value < -126.0f ? -126.0f : value;
    float whole = (value + 12582912.0f) - 12582912.0f, rest = value - whole; /* 1.5 * 2^23: rounds to an integer */
    float power = 1.5403530e-4f;
    power = power * rest + 1.3333558e-3f;
    power = power * rest + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
    return power * of_bits((uint32_t)((int32_t)whole + 127) << 23);
}

/* One row. visible: whether each key is seen, or NULL. Returns log2 of the sum of 2^(score * factor), +infinity where
no key is seen, whose probabilities are 0. */
FOR_EACH_CPU
static float softmax_row(float *scores, int64_t keys, const uint8_t *visible, float factor, uint64_t row_key,
                         uint32_t first_key, uint32_t threshold, float scale, uint16_t *out) {
    float highest = -FLT_MAX, sum = 0.0f, unsound = 0.0f; /* 0, or NaN where a score is infinite or NaN */
    if (visible) {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) scores[k] = visible[k] ? scores[k] * factor : -FLT_MAX;
    } else {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) scores[k] *= factor;
    }
#pragma omp simd reduction(max : highest) reduction(+ : unsound)
    for (int64_t k = 0; k < keys; k++) {
        highest = scores[k] > highest ? scores[k] : highest;
        unsound += scores[k] * 0.0f;
    }
    int seen = highest > -FLT_MAX || isnan(unsound);
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < keys; k++) {
        float power = scores[k] > -FLT_MAX ? exp2_of(scores[k] - highest) : 0.0f;
        scores[k] = power;
        sum += power;
    }
    sum += unsound;
    float share = seen ? scale / sum : 0.0f;
    if (out) {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++)
            out[k] = to_bfloat16(random_bits(row_key, first_key + (uint32_t)k) >= threshold ? scores[k] * share : 0.0f);
    } else {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++)
            scores[k] = random_bits(row_key, first_key + (uint32_t)k) >= threshold ? scores[k] * share : 0.0f;
    }
    return seen ? highest + log2f(sum) : INFINITY;
}

/* One row back: see `softmax_dropout_backward`. */
FOR_EACH_CPU
static void softmax_row_backward(float *scores, float *gradients, int64_t keys, const uint8_t *visible, float factor,
                                 float unscaled, uint64_t row_key, uint32_t first_key, uint32_t threshold, float scale,
                                 float normalizer, float product, uint16_t *out, uint16_t *gradients_out) {
    if (visible) {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) scores[k] = visible[k] ? scores[k] : -FLT_MAX;
    }
#pragma omp simd
    for (int64_t k = 0; k < keys; k++) {
        float score = scores[k] * factor - normalizer;
        float share = scores[k] > -FLT_MAX ? exp2_of(score > 0.0f ? 0.0f : score) : 0.0f;
        float kept = random_bits(row_key, first_key + (uint32_t)k) >= threshold ? scale : 0.0f;
        scores[k] = share * kept;
        gradients[k] = share * (kept * gradients[k] - product) * unscaled;
    }
    if (out) {
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) {
            out[k] = to_bfloat16(scores[k]);
            gradients_out[k] = to_bfloat16(gradients[k]);
        }
    }
}

FOR_EACH_CPU
static void dropout_block(const void *values, void *out, int64_t first, int64_t size, int32_t is_bfloat16,
                          uint64_t row_key, uint32_t threshold, float scale) {
    if (is_bfloat16) {
        const uint16_t *from = (const uint16_t *)values + first;
        uint16_t *to = (uint16_t *)out + first;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            uint16_t scaled = to_bfloat16(from_bfloat16(from[i]) * scale);
            to[i] = random_bits(row_key, (uint32_t)i) >= threshold ? scaled : 0;
        }
    } else {
        const float *from = (const float *)values + first;
        float *to = (float *)out + first;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float scaled = from[i] * scale;
            to[i] = random_bits(row_key, (uint32_t)i) >= threshold ? scaled : 0.0f;
        }
    }
}

/* Softmax and dropout over the keys of scores [heads, queries, keys], the keys [first_key, first_key + keys) of each
row: to `out` as bfloat16, or where that is NULL in place. normalizers [heads, queries]: as `softmax_row` returns them.

visible [queries, visible_stride]: bytes, or NULL. first_row + head * rows_of_head + query is the row's number.
factor: of the scores, times log2(e). What is drawn below threshold / 2^32 is dropped, the rest multiplied with scale. */
void softmax_dropout(int64_t heads, int64_t queries, int64_t keys, const uint8_t *visible, int64_t visible_stride,
                     float factor, uint64_t key, int64_t first_row, int64_t rows_of_head, int64_t first_key,
                     uint32_t threshold, float scale, float *scores, uint16_t *out, float *normalizers) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < heads * queries; row++) {
        int64_t head = row / queries, query = row % queries;
        uint64_t row_key = row_key_of(key, (uint64_t)(first_row + head * rows_of_head + query));
        normalizers[row] = softmax_row(scores + row * keys, keys, visible ? visible + query * visible_stride : NULL,
                                       factor, row_key, (uint32_t)first_key, threshold, scale,
                                       out ? out + row * keys : NULL);
    }
}

/* The way back: `scores` become the probabilities after dropout, and `gradients`, of those, the gradients of the scores;
to two arrays of bfloat16, or where these are NULL in place. unscaled: factor without log2(e). products [heads, queries]:
the sum over an output's elements of output times gradient. The other arguments as they were. */
void softmax_dropout_backward(int64_t heads, int64_t queries, int64_t keys, const uint8_t *visible,
                              int64_t visible_stride, float factor, uint64_t key, int64_t first_row,
                              int64_t rows_of_head, int64_t first_key, uint32_t threshold, float scale, float unscaled,
                              const float *normalizers, const float *products, float *scores, float *gradients,
                              uint16_t *out, uint16_t *gradients_out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < heads * queries; row++) {
        int64_t head = row / queries, query = row % queries;
        uint64_t row_key = row_key_of(key, (uint64_t)(first_row + head * rows_of_head + query));
        softmax_row_backward(scores + row * keys, gradients + row * keys, keys,
                             visible ? visible + query * visible_stride : NULL, factor, unscaled, row_key,
                             (uint32_t)first_key, threshold, scale, normalizers[row], products[row],
                             out ? out + row * keys : NULL, out ? gradients_out + row * keys : NULL);
    }
}

/* Dropout of `count` values, float32 or bfloat16. */
void dropout(int64_t count, int32_t is_bfloat16, uint64_t key, uint32_t threshold, float scale, const void *values,
             void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        int64_t first = block * BLOCK;
        dropout_block(values, out, first, count - first < BLOCK ? count - first : BLOCK, is_bfloat16,
                      row_key_of(key, (uint64_t)block), threshold, scale);
    }
}
