/* nf4.h - the 4-bit types of QLoRA: NF4 and FP4 in blocks of 64, block scales quantised
 * a second time to 8 bits (double quantisation).
 *
 * Source: Dettmers et al., "QLoRA" (arXiv 2305.14314) section 3, and the serialised form
 * of bitsandbytes.  Codes and scales are bit-identical to that implementation's (CUDA rule;
 * a block of zeros takes the code of 0.0).  Reference layout: a tensor is flattened
 * row-major and cut into blocks of 64 elements that ignore row ends; the last block may be
 * short.  Element 2i lies in the HIGH nibble of byte i, element 2i+1 in the low one.
 * Pure functions: any thread may call. */
#ifndef ENGINE_NF4_H
#define ENGINE_NF4_H

#include <stddef.h>
#include <stdint.h>

enum { NF4_BLOCK = 64, NF4_NESTED_BLOCK = 256 };
enum q4_type { Q4_NF4, Q4_FP4 };

extern const float nf4_code[16];       /* values of the codes, ascending */
extern const float fp4_code[16];       /* not monotone in the index; 8 is a second zero */
extern const float nf4_dynamic8[256];  /* signed dynamic map for the scales, ascending */

static inline size_t nf4_bytes(size_t n) { return (n + 1) / 2; }
static inline size_t nf4_blocks(size_t n) { return (n + NF4_BLOCK - 1) / NF4_BLOCK; }
static inline size_t nf4_nested_blocks(size_t n)
{
    return (nf4_blocks(n) + NF4_NESTED_BLOCK - 1) / NF4_NESTED_BLOCK;
}

/* w[n] -> packed[nf4_bytes(n)], absmax[nf4_blocks(n)].  An odd n is padded with the code
 * of 0.0.  The caller has made sure that w is finite. */
void q4_quantize(enum q4_type type, const float *w, size_t n, uint8_t *packed, float *absmax);

/* absmax[blocks] -> codes[blocks], nested_absmax[ceil(blocks/256)], *offset (the mean). */
void q4_nest(const float *absmax, size_t blocks, uint8_t *codes, float *nested_absmax,
             float *offset);
/* The inverse: absmax' = map[code] * nested_absmax + offset, two roundings. */
void q4_unnest(const uint8_t *codes, const float *nested_absmax, float offset, size_t blocks,
               float *absmax);
/* w'[i] = code value * absmax[i / 64]. */
void q4_dequantize(enum q4_type type, const uint8_t *packed, const float *absmax, size_t n,
                   float *w);

/* --- P16: the layout that the kernels read ----------------------------------
 * For a matrix [N, K] with K a multiple of 64.  Rows are cut into panels of 16 (the last
 * is filled up with zero rows); panel p, block b is 512 bytes: 8 groups g of 64 bytes; in
 * a group, 4 bytes per row r (r = 0..15); byte j of those holds element k = 64b + 8g + j
 * of row 16p + r in its LOW nibble and element k + 4 in its HIGH nibble (j = 0..3). */
static inline size_t p16_panels(size_t N) { return (N + 15) / 16; }
static inline size_t p16_bytes(size_t N, size_t K) { return p16_panels(N) * K * 8; }
static inline size_t p16_scales(size_t N, size_t K) { return p16_panels(N) * 16 * (K / 64); }

void p16_pack(const uint8_t *packed, size_t N, size_t K, uint8_t *p16);
void p16_unpack(const uint8_t *p16, size_t N, size_t K, uint8_t *packed);
/* absmax in reference order [N][K/64] -> scales [panel][K/64][16] as fp16 and, if
 * `scales32` is not NULL, also unrounded.  Padding rows get scale 0. */
void p16_scales_from(const float *absmax, size_t N, size_t K, uint16_t *scales16,
                     float *scales32);

#endif
