/* base_int.h - shared by import and load: which weights a model has, in the order of the file, and
 * the names that a base file adds to them. */
#ifndef ENGINE_BASE_INT_H
#define ENGINE_BASE_INT_H

#include "engine/arch.h"
#include "engine/err.h"

#include <stddef.h>

#define BASE_FORMAT "1"

enum weight_kind {
    W_EMBED, W_POSITIONS, W_HEAD, /* of the model */
    W_NORM, W_NORM_BIAS,          /* of the model or of a layer */
    W_LINEAR, W_BIAS,             /* of a module of a layer */
};

struct weight {
    char name[128];
    enum weight_kind kind;
    int layer;
    enum module module;
    enum norm norm;
    int N, K; /* K = 0: a vector of N */
};

/* Every weight of the model, the head last even if it is tied.  free() the list. */
int base_weights(const struct arch *a, struct weight **ret, size_t *ret_n, struct err *err);

/* X with ".absmax" and the like appended. */
struct part_name { char s[160]; };
struct part_name base_part(const char *weight, const char *part);

#endif
