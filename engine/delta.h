/* delta.h - an adapter seen as the change that it makes to each weight matrix,
 *     change = scaling * B diag(E) A,
 * without ever forming it: its size, and how far two changes are apart.
 *
 * All sums are over small Gram matrices (rank x rank) in fp64:
 *     <s1 B1 A1, s2 B2 A2> = s1 s2 * sum over i, j of (B1^T B2)_ij (A1 A2^T)_ij
 * Pure functions of immutable adapters: any thread. */
#ifndef ENGINE_DELTA_H
#define ENGINE_DELTA_H

#include "engine/adapter.h"

/* Is the adapter nothing but such changes of linear layers?  This is the one place that says what
 * diff, export and merge can do exactly; ERR_INVALID names what they cannot. */
int delta_check(const struct adapter_src *a, struct err *err);

/* Frobenius norm of each module's change, ret[nmodules]. */
int delta_norms(const struct adapter_src *a, double *ret, struct err *err);

/* --- two adapters --------------------------------------------------------------------------- */
/* Index 0 is the first adapter, 1 the second.  A module that one of them has not got counts as a
 * change of rank 0. */
struct delta_row {
    const char *path;   /* of one of the adapters */
    int layer, rank[2];
    double norm[2];
    double diff;        /* norm of first - second */
    double cosine;      /* NAN where a norm is 0 */
};

struct delta {
    size_t n;
    struct delta_row *rows; /* ascending by (layer, module) */
    struct delta_row all;   /* of all modules as one long vector; its path is NULL, ranks are sums */
};

/* Multiply-adds that delta_compare() takes, for whoever wants a limit. */
double delta_cost(const struct adapter_src *a, const struct adapter_src *b);
/* ERR_CONFLICT if they are not for layers of the same shape.  The paths are borrowed from a and b. */
int delta_compare(const struct adapter_src *a, const struct adapter_src *b, struct delta *ret,
                  struct err *err);
void delta_free(struct delta *d);

/* --- elements ------------------------------------------------------------------------------- */
/* Element i of a tensor of an adapter, which may lie unaligned. */
float delta_element(const void *tensor, enum dtype t, size_t i);
/* E_j, or 1 where there is none. */
float delta_e(const struct adapter_src_module *m, size_t j);

#endif
