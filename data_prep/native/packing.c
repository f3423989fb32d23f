/* Samples out of documents and sentences, and the order of a blend.

A "sample" is given by its pieces, stretches of tokens; positions are what it has room for, of which a masked-LM piece
takes `frame` beside its tokens. */
#include <stdint.h>
#include <stdlib.h>

static inline uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
    return value ^ (value >> 31);
}

/* Number `index` of the stream of random numbers named by `key` (SplitMix64). */
static inline uint64_t draw(uint64_t key, uint64_t index) {
    return mixed(key + (index + 1) * UINT64_C(0x9E3779B97F4A7C15));
}

/* A number in [0, size) from 64 random bits, size below 2^32. */
static inline int64_t scaled(uint64_t bits, int64_t size) { return (int64_t)((bits >> 32) * (uint64_t)size >> 32); }

/* Best-fit-decreasing bin packing of sizes in [1, capacity]: the largest first, each into the fullest bin that has
room for it. bins [items]: the bin of each. Returns how many there are, or -1 without memory. */
int64_t best_fit(const int32_t *sizes, int64_t items, int32_t capacity, int64_t *bins) {
    int64_t *of_size = calloc((size_t)capacity + 2, sizeof *of_size);
    int64_t *sorted = malloc((size_t)(items ? items : 1) * sizeof *sorted);
    int64_t *next = malloc((size_t)(items ? items : 1) * sizeof *next);
    int64_t *with_room = malloc(((size_t)capacity + 1) * sizeof *with_room);
    int64_t words = capacity / 64 + 1;
    uint64_t *any = calloc((size_t)words, sizeof *any);
    int64_t count = 0;
    if (!of_size || !sorted || !next || !with_room || !any) {
        count = -1;
        goto end;
    }
    for (int64_t i = 0; i < items; i++) of_size[capacity - sizes[i] + 1]++;
    for (int32_t c = 0; c < capacity; c++) of_size[c + 1] += of_size[c];
    for (int64_t i = 0; i < items; i++) sorted[of_size[capacity - sizes[i]]++] = i;
    for (int32_t room = 0; room <= capacity; room++) with_room[room] = -1;
    for (int64_t i = 0; i < items; i++) {
        int32_t size = sizes[sorted[i]];
        int64_t word = size / 64;
        uint64_t bits = any[word] & (~UINT64_C(0) << (size % 64));
        while (!bits && ++word < words) bits = any[word];
        int64_t bin;
        int32_t room;
        if (bits) {
            room = (int32_t)(word * 64 + __builtin_ctzll(bits));
            bin = with_room[room];
            with_room[room] = next[bin];
            if (with_room[room] < 0) any[word] &= ~(UINT64_C(1) << (room % 64));
        } else {
            room = capacity;
            bin = count++;
        }
        bins[sorted[i]] = bin;
        room -= size;
        next[bin] = with_room[room];
        with_room[room] = bin;
        any[room / 64] |= UINT64_C(1) << (room % 64);
    }
end:
    free(of_size), free(sorted), free(next), free(with_room), free(any);
    return count;
}

/* A sample's length: `longest`, but with probability short_of_2_32 / 2^32 one drawn evenly from [shortest, longest]
(Devlin et al. 2019, released code: short_seq_prob). */
static int64_t length_of(uint64_t key, int64_t sample, uint64_t short_of_2_32, int64_t shortest, int64_t longest) {
    if (draw(key, 2 * (uint64_t)sample) >> 32 >= short_of_2_32) return longest;
    return shortest + scaled(draw(key, 2 * (uint64_t)sample + 1), longest - shortest + 1);
}

/* Whole sentences, one after the other, until the next one does not fit; one longer than a sample is cut.

first [documents + 1], starts: sentences as data_prep/sentences.py keeps them, of these documents; begin, end
[documents]: their tokens. Writes the pieces (first token and tokens) and how many pieces each sample has; with `start`
null it only counts. counts: samples and pieces. */
void full_sentences(const int64_t *first, const int32_t *starts, const int64_t *begin, const int64_t *end,
                    int64_t documents, int64_t capacity, int64_t frame, uint64_t key, uint64_t short_of_2_32,
                    int64_t *start, int32_t *length, int32_t *pieces_of, int64_t *counts) {
    int64_t samples = 0, pieces = 0, in_sample = 0, used = 0;
    int open = 0; /* whether the last piece can be made longer */
    int64_t target = length_of(key, 0, short_of_2_32, frame + 2, capacity);
#define CLOSE()                                                                \
    do {                                                                       \
        if (start) pieces_of[samples] = (int32_t)in_sample;                    \
        samples++;                                                             \
        in_sample = used = 0;                                                  \
        open = 0;                                                              \
        target = length_of(key, samples, short_of_2_32, frame + 2, capacity);  \
    } while (0)
    for (int64_t d = 0; d < documents; d++, open = 0) {
        for (int64_t s = first[d]; s < first[d + 1]; s++) {
            int64_t at = begin[d] + starts[s];
            int64_t stop = s + 1 < first[d + 1] ? begin[d] + starts[s + 1] : end[d];
            if (stop > end[d]) stop = end[d];
            while (at < stop) {
                int64_t take = stop - at, cost = open ? 0 : frame;
                if (used + take + cost > target) {
                    if (used) {
                        CLOSE();
                        continue;
                    }
                    take = target - frame;
                }
                if (open) {
                    if (start) length[pieces - 1] += (int32_t)take;
                } else {
                    if (start) start[pieces] = at, length[pieces] = (int32_t)take;
                    pieces++, in_sample++;
                    open = 1;
                }
                used += take + cost;
                at += take;
                if (used == target) CLOSE();
            }
        }
    }
    if (used) CLOSE();
#undef CLOSE
    counts[0] = samples, counts[1] = pieces;
}

/* Pairs of stretches of sentences, of one document each, for next-sentence prediction and sentence order (Devlin et
al. 2019, released code; Lan et al. 2020): whole sentences until the next one does not fit, cut in two at one of their
starts. A sentence longer than half a sample counts as several of half a sample. What is left of a document and has no
second sentence is left out.

As full_sentences; every sample has two pieces. */
void sentence_pairs(const int64_t *first, const int32_t *starts, const int64_t *begin, const int64_t *end,
                    int64_t documents, int64_t capacity, uint64_t key, uint64_t short_of_2_32, int64_t *start,
                    int32_t *length, int64_t *counts) {
    int64_t samples = 0, half = capacity / 2;
    for (int64_t d = 0; d < documents; d++) {
        int64_t s = first[d], at = begin[d];
        int64_t chunk = at;  /* first token of the sample that is being filled */
        int64_t units = 0;   /* in it */
        int64_t cut = 0;     /* where its second stretch begins: one of its units' starts, each as likely as any */
        int64_t target = length_of(key, samples, short_of_2_32, 2, capacity);
        for (;;) {
            /* The next unit: [at, stop). */
            while (s < first[d + 1] && (begin[d] + starts[s] <= at)) s++;
            int64_t stop = s < first[d + 1] ? begin[d] + starts[s] : end[d];
            if (stop > end[d]) stop = end[d];
            if (stop - at > half) stop = at + half;
            int more = at < stop;
            if (units >= 2 && (!more || stop - chunk > target)) {
                if (start) {
                    start[2 * samples] = chunk, length[2 * samples] = (int32_t)(cut - chunk);
                    start[2 * samples + 1] = cut, length[2 * samples + 1] = (int32_t)(at - cut);
                }
                samples++;
                target = length_of(key, samples, short_of_2_32, 2, capacity);
                chunk = at, units = 0;
            }
            if (!more) break;
            /* Reservoir sampling: unit number n becomes the second stretch's first with probability 1 / n. */
            if (units && scaled(draw(~key, (uint64_t)at), units) == 0) cut = at;
            units++;
            at = stop;
        }
    }
    counts[0] = samples;
}

/* Which of `components` comes at each place of a blend's period, so that after every place each has had its share of
them to within one (earliest deadline first over the windows of Baruah et al. 1996, "Proportionate progress").

shares [components]: places of each in the period; they add up to `period`. Writes component and its rank, how many of
its places came before [period]. */
void blend(const int64_t *shares, int64_t components, int64_t period, int32_t *component, int32_t *rank) {
    int64_t *done = calloc((size_t)components, sizeof *done);
    if (!done) abort();
    for (int64_t t = 0; t < period; t++) {
        int64_t best = -1, best_deadline = INT64_MAX;
        for (int64_t k = 0; k < components; k++) {
            if (done[k] == shares[k] || done[k] * period / shares[k] > t) continue;
            int64_t deadline = ((done[k] + 1) * period + shares[k] - 1) / shares[k];
            if (deadline < best_deadline) best = k, best_deadline = deadline;
        }
        component[t] = (int32_t)best, rank[t] = (int32_t)done[best]++;
    }
    free(done);
}
