/* prob.h - from logits to probabilities in fp64, the same bits on every CPU.
 *
 * libm's exp and log may differ in the last bit between machines, and a sum depends on its order.
 * Here both are fixed: exp and log are our own (within 2 units in the last place), and every sum
 * over a vocabulary runs in 8 lanes (element i in lane i % 8), added up at the end as
 * ((0+4)+(2+6)) + ((1+5)+(3+7)).
 *
 * Pure functions over caller memory; any thread. */
#ifndef ENGINE_PROB_H
#define ENGINE_PROB_H

#include <stdbool.h>

/* The largest of n >= 1 logits.  false if one is NaN or +infinity, or all are -infinity. */
bool prob_max(const float *logits, int n, float *ret);
/* w[i] = exp((logits[i] - max) * scale) with scale >= 0, 0 below exp(-700); returns the sum.
 * `w` may be NULL when only the sum is wanted. */
double prob_exp(const float *logits, int n, float max, double scale, double *w);
/* The same without vector instructions (for tests). */
double prob_exp_plain(const float *logits, int n, float max, double scale, double *w);
/* The natural logarithm of a finite x > 0. */
double prob_log(double x);

#endif
