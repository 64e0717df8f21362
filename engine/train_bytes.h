/* train_bytes.h - saved state of training: numbers one after the other, little-endian, unaligned.
 *
 * Writing is buf_add() of the numbers as they lie in memory; every machine that this is built for
 * is little-endian. */
#ifndef ENGINE_TRAIN_BYTES_H
#define ENGINE_TRAIN_BYTES_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "saved state is little-endian");

/* What is left to read. */
struct train_bytes {
    const uint8_t *at;
    size_t left;
};

/* The next n bytes, or NULL if there are not so many. */
static inline const void *train_bytes_skip(struct train_bytes *b, size_t n)
{
    if (n > b->left)
        return NULL;
    const void *ret = b->at;
    b->at += n;
    b->left -= n;
    return ret;
}

static inline bool train_bytes_take(struct train_bytes *b, void *ret, size_t n)
{
    const void *from = train_bytes_skip(b, n);
    if (from != NULL && n > 0)
        memcpy(ret, from, n);
    return from != NULL;
}

/* Are n floats at `from`, aligned or not, finite and at least `least`? */
static inline bool train_bytes_floats_ok(const void *from, size_t n, float least)
{
    for (size_t i = 0; i < n; i++) {
        float f;
        memcpy(&f, (const uint8_t *)from + i * sizeof f, sizeof f);
        if (!isfinite(f) || f < least)
            return false;
    }
    return true;
}

#endif
