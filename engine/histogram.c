/* histogram.c - see histogram.h. */
#include "engine/histogram.h"

const double histogram_bounds[HISTOGRAM_BOUNDS] = {
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30,
};

#define SECONDS_MAX 1e9 /* that many nanoseconds fit an integer */

/* Only the writer calls this, so a plain load and store is enough. */
static void add(_Atomic uint64_t *n, uint64_t more)
{
    atomic_store_explicit(n, atomic_load_explicit(n, memory_order_relaxed) + more,
                          memory_order_relaxed);
}

void histogram_add(struct histogram *h, double seconds)
{
    const double s = !(seconds > 0) ? 0 : seconds < SECONDS_MAX ? seconds : SECONDS_MAX;
    int i = 0;
    while (i < HISTOGRAM_BOUNDS && s > histogram_bounds[i])
        i++;
    const uint64_t ns = (uint64_t)(s * 1e9);
    add(&h->bucket[i], 1);
    add(&h->sum_ns, ns);
    if (ns > atomic_load_explicit(&h->max_ns, memory_order_relaxed))
        atomic_store_explicit(&h->max_ns, ns, memory_order_relaxed);
}

void histogram_read(struct histogram *h, struct histogram_stats *ret)
{
    for (int i = 0; i <= HISTOGRAM_BOUNDS; i++)
        ret->bucket[i] = atomic_load_explicit(&h->bucket[i], memory_order_relaxed);
    ret->sum = (double)atomic_load_explicit(&h->sum_ns, memory_order_relaxed) / 1e9;
    ret->max = (double)atomic_load_explicit(&h->max_ns, memory_order_relaxed) / 1e9;
}
