/* What training asks for at every step: numbers of a permutation, and stretches of files. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROUNDS 6

static inline uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
    return value ^ (value >> 31);
}

/* A Feistel network over pairs below `side` (data_prep/randomness.py): the upper half of the hash of one half, scaled to
[0, side) (Lemire 2019), is added to the other modulo side. */
static inline uint64_t encrypted(uint64_t value, uint64_t side, const uint64_t *keys) {
    uint64_t left = value / side, right = value % side;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t moved = left + ((mixed(right + keys[round]) >> 32) * side >> 32);
        if (moved >= side) moved -= side;
        left = right;
        right = moved;
    }
    return left * side + right;
}

/* The elements at these places of a permutation of range(size), in place; side * side is at least size. */
void permute(int64_t *index, int64_t count, uint64_t size, uint64_t side, const uint64_t *keys) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t value = (uint64_t)index[i];
        do value = encrypted(value, side, keys);
        while (value >= size);
        index[i] = (int64_t)value;
    }
}

/* Reads bytes [offset, offset + size) of a file. Returns -1, an errno, or 0 where the file ends before. */
static int32_t read_whole(int file, int64_t offset, int64_t size, uint8_t *out) {
    for (int64_t done = 0; done < size;) {
        ssize_t found = pread(file, out + done, (size_t)(size - done), offset + done);
        if (found < 0 && errno == EINTR) continue;
        if (found <= 0) return found < 0 ? errno : 0;
        done += found;
    }
    return -1;
}

/* Reads stretches of files to their positions in `out`: bytes [offsets, offsets + sizes) of each file.

What is not in memory is announced first, all of it, so that a disk works on the stretches side by side, and then waited
for. Returns -1, or the number of a stretch that could not be read, with `error` the errno, or 0 where the file ends
before it; -2 without memory. */
int64_t read_stretches(const int32_t *files, const int64_t *offsets, const int64_t *sizes, const int64_t *positions,
                       int64_t count, uint8_t *out, int32_t *error) {
    int64_t *absent = malloc((size_t)(count ? count : 1) * sizeof *absent);
    int64_t waiting = 0, failed = -1;
    if (!absent) return -2;
    for (int64_t i = 0; i < count; i++) {
        struct iovec place = {out + positions[i], (size_t)sizes[i]};
        /* A file system that cannot say whether it has something at hand fails here, and is asked once more below. */
        if (preadv2(files[i], &place, 1, offsets[i], RWF_NOWAIT) == (ssize_t)sizes[i]) continue;
        posix_fadvise(files[i], offsets[i], sizes[i], POSIX_FADV_WILLNEED);
        absent[waiting++] = i;
    }
    for (int64_t w = 0; w < waiting && failed < 0; w++) {
        int64_t i = absent[w];
        *error = read_whole(files[i], offsets[i], sizes[i], out + positions[i]);
        if (*error >= 0) failed = i;
    }
    free(absent);
    return failed;
}
