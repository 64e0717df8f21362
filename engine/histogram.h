/* histogram.h - how often something took how long, for GET /metrics.
 *
 * One thread writes, any thread reads: a copy may be a few observations old in one place and newer
 * in another, never wrong for long.  Zeroed memory is an empty histogram. */
#ifndef ENGINE_HISTOGRAM_H
#define ENGINE_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>

enum { HISTOGRAM_BOUNDS = 16 };
/* Upper ends of the buckets in seconds, rising; one more bucket holds what is longer. */
extern const double histogram_bounds[HISTOGRAM_BOUNDS];

struct histogram {
    _Atomic uint64_t bucket[HISTOGRAM_BOUNDS + 1];
    _Atomic uint64_t sum_ns, max_ns;
};

struct histogram_stats {
    uint64_t bucket[HISTOGRAM_BOUNDS + 1]; /* each its own, not added up */
    double sum, max;                       /* seconds */
};

/* Negative is 0, and so is what is not a number. */
void histogram_add(struct histogram *h, double seconds);
void histogram_read(struct histogram *h, struct histogram_stats *ret);

#endif
