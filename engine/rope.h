/* rope.h - the angles of rotary position embeddings.
 *
 * cos and sin of pos * f_i are put together from two small tables in double, for pos = 256 a + b, by
 * the addition theorem, and rounded to float once: right to the last bit or nearly, at any position,
 * for a few hundred kilobytes where a full table would take tens of megabytes.
 *
 * A model with LongRoPE has two sets of frequencies: one for contexts of up to rope_original_max
 * positions, one for longer ones.  Which one counts follows from the context that is configured,
 * not from how long a sequence has become: keys in the cache were turned by one of them and stay
 * so, for whoever shares them and whatever is appended.
 *
 * Immutable once made; any thread may use it. */
#ifndef ENGINE_ROPE_H
#define ENGINE_ROPE_H

#include "engine/arch.h"

struct rope;
/* Of models with rope: rot > 0. */
size_t rope_bytes(const struct arch *a);
/* `context`: as many positions as a sequence may get. */
int rope_create(const struct arch *a, int context, struct rope **ret, struct err *err);
void rope_destroy(struct rope *r); /* NULL is fine */
/* cos and sin, times the model's amplitude, of all rot/2 angles of position 0 <= pos < max_positions. */
void rope_angles(const struct rope *r, int pos, float *cos, float *sin);
/* f_i after the model's scaling. */
double rope_frequency(const struct arch *a, int context, int i);

#endif
