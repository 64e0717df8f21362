/* nf4.c - quantise to NF4 and FP4, quantise the scales again, and rearrange into panels.
 *
 * A code is the number of thresholds that lie below the scaled weight, so a value exactly on a
 * threshold takes the lower code.  Three details decide the last bit and are kept on purpose:
 * the scaled weight is w * (1/absmax) with the reciprocal rounded first, not w / absmax; the
 * thresholds are fp32 midpoints of neighbouring codes; and the mean of the block scales is summed
 * in the reference's order (mean_of), because one ulp of it moves codes of the scales. */
#include "engine/nf4.h"
#include "engine/num.h"

#include <math.h>
#include <string.h>

const float nf4_code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/* Sign bit 3; the magnitudes are 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths. */
const float fp4_code[16] = {
    0.0f, 0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

/* clang-format off */
/* The reference's signed dynamic map: seven decades, decade d (0..6) with 2^d values of each sign,
 * the middles of 2^d equal parts of [0.1, 1] times 10^(d - 6); then 0 and +1 (there is no -1).
 * Written out because the last bits depend on how each step of that is rounded. */
const float nf4_dynamic8[256] = {
    -0.992968738f, -0.978906274f, -0.96484375f, -0.950781226f, -0.936718762f, -0.922656238f,
    -0.908593774f, -0.89453125f, -0.880468726f, -0.866406262f, -0.852343738f, -0.838281274f,
    -0.82421875f, -0.810156226f, -0.796093762f, -0.782031238f, -0.767968774f, -0.75390625f,
    -0.739843726f, -0.725781262f, -0.711718798f, -0.697656274f, -0.68359375f, -0.669531226f,
    -0.655468762f, -0.641406298f, -0.627343774f, -0.61328125f, -0.599218726f, -0.585156262f,
    -0.571093798f, -0.557031274f, -0.54296875f, -0.528906226f, -0.514843702f, -0.500781238f,
    -0.486718714f, -0.47265625f, -0.458593726f, -0.444531262f, -0.430468738f, -0.416406244f,
    -0.40234375f, -0.388281226f, -0.374218762f, -0.360156238f, -0.346093744f, -0.33203125f,
    -0.317968726f, -0.303906262f, -0.289843738f, -0.275781274f, -0.26171875f, -0.247656241f,
    -0.233593747f, -0.219531253f, -0.205468744f, -0.19140625f, -0.177343756f, -0.163281247f,
    -0.149218753f, -0.135156244f, -0.12109375f, -0.107031256f, -0.0985937491f, -0.0957812592f,
    -0.0929687545f, -0.0901562497f, -0.0873437524f, -0.0845312476f, -0.0817187577f, -0.078906253f,
    -0.0760937482f, -0.0732812509f, -0.0704687461f, -0.0676562563f, -0.0648437515f,
    -0.0620312504f, -0.0592187531f, -0.0564062484f, -0.053593751f, -0.05078125f, -0.047968749f,
    -0.0451562516f, -0.0423437469f, -0.0395312496f, -0.0367187522f, -0.0339062512f,
    -0.0310937501f, -0.028281251f, -0.0254687499f, -0.0226562507f, -0.0198437516f, -0.0170312505f,
    -0.0142187504f, -0.0114062503f, -0.00971874967f, -0.00915624946f, -0.00859375019f,
    -0.00803124998f, -0.00746874977f, -0.00690625003f, -0.00634374982f, -0.00578125007f,
    -0.00521875033f, -0.00465624966f, -0.00409374991f, -0.00353124971f, -0.00296874996f,
    -0.00240624999f, -0.00184375001f, -0.00128124992f, -0.000943750085f, -0.000831249985f,
    -0.00071875006f, -0.000606250076f, -0.000493750034f, -0.000381250022f, -0.000268750038f,
    -0.000156250011f, -8.87499991e-05f, -6.62500024e-05f, -4.37499984e-05f, -2.12499981e-05f,
    -7.7499999e-06f, -3.25000019e-06f, -5.50000038e-07f, 0.0f, 5.50000038e-07f, 3.25000019e-06f,
    7.7499999e-06f, 2.12499981e-05f, 4.37499984e-05f, 6.62500024e-05f, 8.87499991e-05f,
    0.000156250011f, 0.000268750038f, 0.000381250022f, 0.000493750034f, 0.000606250076f,
    0.00071875006f, 0.000831249985f, 0.000943750085f, 0.00128124992f, 0.00184375001f,
    0.00240624999f, 0.00296874996f, 0.00353124971f, 0.00409374991f, 0.00465624966f,
    0.00521875033f, 0.00578125007f, 0.00634374982f, 0.00690625003f, 0.00746874977f,
    0.00803124998f, 0.00859375019f, 0.00915624946f, 0.00971874967f, 0.0114062503f, 0.0142187504f,
    0.0170312505f, 0.0198437516f, 0.0226562507f, 0.0254687499f, 0.028281251f, 0.0310937501f,
    0.0339062512f, 0.0367187522f, 0.0395312496f, 0.0423437469f, 0.0451562516f, 0.047968749f,
    0.05078125f, 0.053593751f, 0.0564062484f, 0.0592187531f, 0.0620312504f, 0.0648437515f,
    0.0676562563f, 0.0704687461f, 0.0732812509f, 0.0760937482f, 0.078906253f, 0.0817187577f,
    0.0845312476f, 0.0873437524f, 0.0901562497f, 0.0929687545f, 0.0957812592f, 0.0985937491f,
    0.107031256f, 0.12109375f, 0.135156244f, 0.149218753f, 0.163281247f, 0.177343756f,
    0.19140625f, 0.205468744f, 0.219531253f, 0.233593747f, 0.247656241f, 0.26171875f,
    0.275781274f, 0.289843738f, 0.303906262f, 0.317968726f, 0.33203125f, 0.346093744f,
    0.360156238f, 0.374218762f, 0.388281226f, 0.40234375f, 0.416406244f, 0.430468738f,
    0.444531262f, 0.458593726f, 0.47265625f, 0.486718714f, 0.500781238f, 0.514843702f,
    0.528906226f, 0.54296875f, 0.557031274f, 0.571093798f, 0.585156262f, 0.599218726f,
    0.61328125f, 0.627343774f, 0.641406298f, 0.655468762f, 0.669531226f, 0.68359375f,
    0.697656274f, 0.711718798f, 0.725781262f, 0.739843726f, 0.75390625f, 0.767968774f,
    0.782031238f, 0.796093762f, 0.810156226f, 0.82421875f, 0.838281274f, 0.852343738f,
    0.866406262f, 0.880468726f, 0.89453125f, 0.908593774f, 0.922656238f, 0.936718762f,
    0.950781226f, 0.96484375f, 0.978906274f, 0.992968738f, 1.0f,
};
/* clang-format on */

/* Below this the reciprocal would overflow; it is the reference's limit too. */
static const float absmax_least = 1e-38f;

static float absmax_of(const float *w, size_t n)
{
    float most = 0.0f;
    for (size_t i = 0; i < n; i++) {
        float a = fabsf(w[i]);
        most = a > most ? a : most;
    }
    return most;
}

static int nf4_encode(float s)
{
    static const float threshold[15] = {
        -0.848096371f, -0.610632896f,  -0.45999527f,  -0.33967942f, -0.234607399f,
        -0.137911737f, -0.0455250181f, 0.0397901498f, 0.120255247f, 0.203521252f,
        0.292013764f,  0.389312536f,   0.501663446f,  0.64278692f,  0.861478448f,
    };
    int code = 0;
    for (int i = 0; i < 15; i++)
        code += s > threshold[i];
    return code;
}

static int fp4_encode(float s)
{
    /* Thresholds of the magnitude, and the codes between them in ascending order of value. */
    static const float threshold[7] = { 0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                        0.4166667f,  0.583333f,  0.8333333f };
    static const uint8_t ascending[8] = { 0, 1, 6, 7, 4, 5, 2, 3 };
    int rank = 0;
    for (int i = 0; i < 7; i++)
        rank += fabsf(s) > threshold[i];
    return (s < 0.0f ? 8 : 0) | ascending[rank];
}

void q4_quantize(enum q4_type type, const float *w, size_t n, uint8_t *packed, float *absmax)
{
    const int zero = type == Q4_NF4 ? 7 : 0;
    for (size_t begin = 0; begin < n; begin += NF4_BLOCK) {
        const size_t len = n - begin < NF4_BLOCK ? n - begin : NF4_BLOCK;
        const float most = absmax_of(w + begin, len), inverse = 1.0f / fmaxf(most, absmax_least);
        uint8_t code[NF4_BLOCK];
        if (len % 2 != 0)
            code[len] = (uint8_t)zero;
        for (size_t i = 0; i < len; i++) {
            float s = w[begin + i] * inverse;
            code[i] = (uint8_t)(type == Q4_NF4 ? nf4_encode(s) : fp4_encode(s));
        }
        for (size_t i = 0; i < len; i += 2)
            packed[(begin + i) / 2] = (uint8_t)(code[i] << 4 | code[i + 1]);
        absmax[begin / NF4_BLOCK] = most;
    }
}

/* --- block scales ------------------------------------------------------------------------ */

/* The reference's mean, all in fp32: 32 lanes (4 groups of 8), each summed through a cascade of
 * four accumulators so that long sums lose little; then groups are added to the first one, what is
 * left at the end is summed by itself, and the 8 lanes are added to that in order. */
enum { LANES = 32, GROUP = 8, LEVELS = 4 };

static void lanes_add(float *a, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        a[i] += x[i];
}

static float mean_of(const float *x, size_t n)
{
    const size_t rows = n / LANES, groups = n / GROUP;
    unsigned log_rows = 0;
    while (log_rows < 63 && (size_t)1 << log_rows < rows)
        log_rows++;
    const unsigned shift = log_rows / LEVELS > 4 ? log_rows / LEVELS : 4;
    const size_t mask = ((size_t)1 << shift) - 1;

    float level[LEVELS][LANES] = { { 0.0f } };
    for (size_t i = 1; i <= rows; i++) {
        lanes_add(level[0], x + LANES * (i - 1), LANES);
        /* An accumulator that has taken 2^shift terms is handed to the next one. */
        for (unsigned j = 1; j < LEVELS && (i >> (j - 1) * shift & mask) == 0; j++) {
            lanes_add(level[j], level[j - 1], LANES);
            memset(level[j - 1], 0, sizeof level[j - 1]);
        }
    }
    float *lane = level[0];
    for (int j = 1; j < LEVELS; j++)
        lanes_add(lane, level[j], LANES);
    for (size_t g = rows * (LANES / GROUP); g < groups; g++)
        lanes_add(lane, x + GROUP * g, GROUP);
    for (int g = 1; g < LANES / GROUP; g++)
        lanes_add(lane, lane + (ptrdiff_t)GROUP * g, GROUP);

    float sum = 0.0f;
    for (size_t i = groups * GROUP; i < n; i++)
        sum += x[i];
    for (int l = 0; l < GROUP; l++)
        sum += lane[l];
    return sum / (float)n;
}

/* How many midpoints of neighbouring map values lie below s. */
static int dynamic8_encode(float s)
{
    int low = 0, high = 255; /* the answer is in [low, high] */
    while (low < high) {
        int mid = (low + high) / 2;
        if (s > (nf4_dynamic8[mid] + nf4_dynamic8[mid + 1]) / 2)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

void q4_nest(const float *absmax, size_t blocks, uint8_t *codes, float *nested_absmax,
             float *offset)
{
    const float mean = blocks > 0 ? mean_of(absmax, blocks) : 0.0f;
    for (size_t begin = 0; begin < blocks; begin += NF4_NESTED_BLOCK) {
        const size_t left = blocks - begin, len = left < NF4_NESTED_BLOCK ? left : NF4_NESTED_BLOCK;
        /* The reference stores the clamped value here, but not for the weights' blocks. */
        float d[NF4_NESTED_BLOCK], most = absmax_least;
        for (size_t i = 0; i < len; i++) {
            d[i] = absmax[begin + i] - mean;
            most = fmaxf(most, fabsf(d[i]));
        }
        const float inverse = 1.0f / most;
        for (size_t i = 0; i < len; i++)
            codes[begin + i] = (uint8_t)dynamic8_encode(d[i] * inverse);
        nested_absmax[begin / NF4_NESTED_BLOCK] = most;
    }
    *offset = mean;
}

void q4_unnest(const uint8_t *codes, const float *nested_absmax, float offset, size_t blocks,
               float *absmax)
{
    for (size_t i = 0; i < blocks; i++)
        absmax[i] = nf4_dynamic8[codes[i]] * nested_absmax[i / NF4_NESTED_BLOCK] + offset;
}

void q4_dequantize(enum q4_type type, const uint8_t *packed, const float *absmax, size_t n,
                   float *w)
{
    const float *code = type == Q4_NF4 ? nf4_code : fp4_code;
    for (size_t i = 0; i < n; i++) {
        int nibble = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
        w[i] = code[nibble] * absmax[i / NF4_BLOCK];
    }
}

/* --- P16 --------------------------------------------------------------------------------- */

enum { PANEL = 16 };

/* Where row `row`, group of eight inputs `group` (k = 8 * group ...) of a [N, K] matrix lies. */
static size_t p16_offset(size_t row, size_t group, size_t K)
{
    return (row / PANEL * (K / 8) + group) * 64 + row % PANEL * 4;
}

void p16_pack(const uint8_t *packed, size_t N, size_t K, uint8_t *p16)
{
    /* Padding rows hold the code of 0.0 in every nibble. */
    if (N % PANEL != 0)
        memset(p16 + p16_bytes(N, K) - K * 8, 0x77, K * 8);
    for (size_t n = 0; n < N; n++)
        for (size_t g = 0; g < K / 8; g++) {
            const uint8_t *in = packed + (n * K + 8 * g) / 2;
            uint8_t *out = p16 + p16_offset(n, g, K);
            /* in: k = 01 23 45 67, the even one high; out: 4|0 5|1 6|2 7|3, high | low */
            out[0] = (uint8_t)((in[2] & 0xf0) | in[0] >> 4);
            out[1] = (uint8_t)(in[2] << 4 | (in[0] & 0x0f));
            out[2] = (uint8_t)((in[3] & 0xf0) | in[1] >> 4);
            out[3] = (uint8_t)(in[3] << 4 | (in[1] & 0x0f));
        }
}

void p16_unpack(const uint8_t *p16, size_t N, size_t K, uint8_t *packed)
{
    for (size_t n = 0; n < N; n++)
        for (size_t g = 0; g < K / 8; g++) {
            const uint8_t *in = p16 + p16_offset(n, g, K);
            uint8_t *out = packed + (n * K + 8 * g) / 2;
            out[0] = (uint8_t)(in[0] << 4 | (in[1] & 0x0f));
            out[1] = (uint8_t)(in[2] << 4 | (in[3] & 0x0f));
            out[2] = (uint8_t)((in[0] & 0xf0) | in[1] >> 4);
            out[3] = (uint8_t)((in[2] & 0xf0) | in[3] >> 4);
        }
}

void p16_scales_from(const float *absmax, size_t N, size_t K, uint16_t *scales16, float *scales32)
{
    const size_t blocks = K / NF4_BLOCK;
    for (size_t p = 0; p < p16_panels(N); p++)
        for (size_t b = 0; b < blocks; b++)
            for (size_t r = 0; r < PANEL; r++) {
                const size_t n = p * PANEL + r, to = (p * blocks + b) * PANEL + r;
                const float scale = n < N ? absmax[n * blocks + b] : 0.0f;
                scales16[to] = f32_to_f16(scale);
                if (scales32 != NULL)
                    scales32[to] = scale;
            }
}
