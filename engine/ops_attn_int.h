/* ops_attn_int.h - the leaves of attention, which have files of their own: ops_attn.c defines them,
 * ops_avx2_attn.c and ops_avx512_attn.c give the same bits.  What they do is in ops.h. */
#ifndef ENGINE_OPS_ATTN_INT_H
#define ENGINE_OPS_ATTN_INT_H

#include "engine/ops.h"

#define OPS_ATTN(isa)                                                                              \
    void isa##_scores(const void *k, enum kv_type type, int hd, float scale, int nq,               \
                      const float *const *q, float *const *s);                                     \
    void isa##_softmax(int nq, struct ops_softmax *const *m, float *const *s, const int *a,        \
                       const int *b, float *ret_fix);                                              \
    void isa##_values(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,       \
                      const float *const *p, float *const *out);                                   \
    void isa##_to_q8(const float *x, int n, int8_t *codes, uint16_t *scales)

OPS_ATTN(scalar);
OPS_ATTN(avx2);
OPS_ATTN(avx512);

/* The scale of a block whose largest number has these bits (without its sign).  Returns what the
 * block is multiplied with before rounding; 0: all codes are 0. */
float ops_q8_scale(uint32_t top, uint16_t *ret_scale);

#endif
