/* optim.c - AdamW, with moments of 32 or 8 bits. */
#include "engine/optim.h"
#include "engine/nf4.h"
#include "engine/train_bytes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIECE = 64 * OPTIM_BLOCK, /* elements that one thread takes at a time */
    LANES = 8,                /* partial sums of the norm */
};

/* Moments of one tensor: m and v, or codes and the largest value of each block. */
struct moments {
    float *m, *v;         /* [n], or NULL */
    uint8_t *cm, *cv;     /* [n], or NULL */
    float *max_m, *max_v; /* [blocks] */
};

struct piece {
    uint32_t tensor;
    size_t begin, n;
};

struct optim {
    struct optim_tensor *tensors;
    struct moments *moments;
    size_t n;
    struct piece *pieces;
    size_t npieces;
    double beta1, beta2, eps, weight_decay;
    int64_t step; /* done */
    float signed_mid[255], unsigned_map[256], unsigned_mid[255];
};

static size_t blocks_of(size_t n) { return n / OPTIM_BLOCK + (n % OPTIM_BLOCK != 0); }

static bool is_8bit(enum train_moments m, size_t n)
{
    return m == TRAIN_MOMENTS_8BIT && n >= OPTIM_8BIT_LEAST;
}

size_t optim_moment_bytes(enum train_moments m, size_t n)
{
    return is_8bit(m, n) ? 2 * n + 2 * blocks_of(n) * sizeof(float) : 2 * n * sizeof(float);
}

/* --- the 8-bit maps -------------------------------------------------------------------------- */
/* Rounded where the reference rounds, whose signed map comes out to the bit in this way: the points
 * of the upper half of an interval are counted from its end, and fused with the product. */
void optim_unsigned_map(float ret[256])
{
    static const float power[7] = { 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f };
    int at = 0;
    ret[at++] = 0.0f;
    for (int d = 0; d < 7; d++) {
        const int parts = 2 << d;
        const float width = (1.0f - 0.1f) / (float)parts;
        float before = 0.1f;
        for (int i = 1; i <= parts; i++) {
            const float point = i < parts / 2 ? fmaf(width, (float)i, 0.1f)
                                              : fmaf(-width, (float)(parts - i), 1.0f);
            ret[at++] = power[d] * ((before + point) / 2.0f);
            before = point;
        }
    }
    ret[at] = 1.0f;
}

static void middles(const float map[256], float ret[255])
{
    for (int i = 0; i < 255; i++)
        ret[i] = (map[i] + map[i + 1]) / 2.0f;
}

/* The number of middles below x: the nearest code, the lower of two. */
static uint8_t code_of(const float mid[255], float x)
{
    int code = 0;
    for (int half = 128; half > 0; half /= 2)
        if (x > mid[code + half - 1])
            code += half;
    return (uint8_t)code;
}

/* The signed map's codes of negative numbers end here; next is 0. */
enum { CODE_LEAST_NEGATIVE = 126, CODE_ZERO = 127 };

/* m and v of one block, of which the largest magnitudes become the scales. */
static void encode(const struct optim *o, const float *m, const float *v, size_t n, uint8_t *cm,
                   uint8_t *cv, float *max_m, float *max_v)
{
    float most_m = 0.0f, most_v = 0.0f;
    for (size_t i = 0; i < n; i++) {
        most_m = fabsf(m[i]) > most_m ? fabsf(m[i]) : most_m;
        most_v = v[i] > most_v ? v[i] : most_v;
    }
    for (size_t i = 0; i < n; i++) {
        cm[i] = most_m > 0 ? code_of(o->signed_mid, m[i] / most_m) : CODE_ZERO;
        if (cm[i] == CODE_ZERO && m[i] < 0)
            cm[i] = CODE_LEAST_NEGATIVE;
        cv[i] = most_v > 0 ? code_of(o->unsigned_mid, v[i] / most_v) : 0;
        if (cv[i] == 0 && v[i] > 0)
            cv[i] = 1;
    }
    *max_m = most_m;
    *max_v = most_v;
}

/* --- making ---------------------------------------------------------------------------------- */
static int moments_create(struct moments *m, enum train_moments kind, size_t n)
{
    const size_t blocks = blocks_of(n);
    if (!is_8bit(kind, n)) {
        m->m = calloc(n + 1, sizeof(float));
        m->v = calloc(n + 1, sizeof(float));
        return m->m != NULL && m->v != NULL ? ERR_OK : ERR_NOMEM;
    }
    m->cm = malloc(n);
    m->cv = calloc(n, 1);
    m->max_m = calloc(blocks, sizeof(float));
    m->max_v = calloc(blocks, sizeof(float));
    if (m->cm == NULL || m->cv == NULL || m->max_m == NULL || m->max_v == NULL)
        return ERR_NOMEM;
    memset(m->cm, CODE_ZERO, n);
    return ERR_OK;
}

static int pieces_create(struct optim *o)
{
    size_t count = 0;
    for (size_t t = 0; t < o->n; t++)
        count += o->tensors[t].n / PIECE + 1;
    o->pieces = malloc((count + 1) * sizeof *o->pieces);
    if (o->pieces == NULL)
        return ERR_NOMEM;
    for (size_t t = 0; t < o->n; t++)
        for (size_t begin = 0; begin < o->tensors[t].n; begin += PIECE) {
            const size_t left = o->tensors[t].n - begin;
            o->pieces[o->npieces++] =
                (struct piece){ (uint32_t)t, begin, left < PIECE ? left : PIECE };
        }
    return ERR_OK;
}

int optim_create(const struct optim_tensor *tensors, size_t n, enum train_moments moments,
                 double beta1, double beta2, double eps, double weight_decay, struct optim **ret,
                 struct err *err)
{
    struct optim *o = calloc(1, sizeof *o);
    if (o == NULL)
        return err_nomem(err);
    *o = (struct optim){
        .n = n, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay
    };
    o->tensors = malloc((n + 1) * sizeof *o->tensors);
    o->moments = calloc(n + 1, sizeof *o->moments);
    if (o->tensors == NULL || o->moments == NULL)
        goto nomem;
    for (size_t t = 0; t < n; t++) {
        o->tensors[t] = tensors[t];
        if (moments_create(&o->moments[t], moments, tensors[t].n) != ERR_OK)
            goto nomem;
    }
    if (pieces_create(o) != ERR_OK)
        goto nomem;
    middles(nf4_dynamic8, o->signed_mid);
    optim_unsigned_map(o->unsigned_map);
    middles(o->unsigned_map, o->unsigned_mid);
    *ret = o;
    return ERR_OK;

nomem:
    optim_destroy(o);
    return err_nomem(err);
}

void optim_destroy(struct optim *o)
{
    if (o == NULL)
        return;
    for (size_t t = 0; o->moments != NULL && t < o->n; t++) {
        const struct moments *m = &o->moments[t];
        free(m->m);
        free(m->v);
        free(m->cm);
        free(m->cv);
        free(m->max_m);
        free(m->max_v);
    }
    free(o->moments);
    free(o->tensors);
    free(o->pieces);
    free(o);
}

/* --- gradients ------------------------------------------------------------------------------- */
double optim_grad_norm(const struct optim *o)
{
    double total = 0;
    for (size_t i = 0; i < o->npieces; i++) {
        const struct piece *p = &o->pieces[i];
        const float *g = o->tensors[p->tensor].g + p->begin;
        double lane[LANES] = { 0 }, sum = 0;
        for (size_t k = 0; k + LANES <= p->n; k += LANES)
            for (int l = 0; l < LANES; l++)
                lane[l] += (double)g[k + (size_t)l] * (double)g[k + (size_t)l];
        for (int l = 0; l < LANES; l++)
            sum += lane[l];
        for (size_t k = p->n - p->n % LANES; k < p->n; k++)
            sum += (double)g[k] * (double)g[k];
        total += sum;
    }
    return sqrt(total);
}

void optim_scale_grads(struct optim *o, float by)
{
    for (size_t t = 0; t < o->n; t++)
        for (size_t i = 0; i < o->tensors[t].n; i++)
            o->tensors[t].g[i] *= by;
}

void optim_zero_grads(struct optim *o)
{
    for (size_t t = 0; t < o->n; t++)
        memset(o->tensors[t].g, 0, o->tensors[t].n * sizeof(float));
}

/* --- the step -------------------------------------------------------------------------------- */
struct step {
    struct optim *o;
    double lr, bias1, bias2_root; /* 1 - beta1^t, sqrt(1 - beta2^t) */
};

/* The numbers of a step that its elements share, for one tensor. */
struct rates {
    float keep, beta1, one_minus_beta1, beta2, one_minus_beta2, size, bias2_root, eps;
};

static void update(const struct rates *k, float *p, const float *g, float *m, float *v, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        m[i] = k->beta1 * m[i] + k->one_minus_beta1 * g[i];
        v[i] = k->beta2 * v[i] + k->one_minus_beta2 * (g[i] * g[i]);
        p[i] = p[i] * k->keep - k->size * (m[i] / (sqrtf(v[i]) / k->bias2_root + k->eps));
    }
}

static void update_8bit(const struct optim *o, const struct rates *k, const struct optim_tensor *t,
                        const struct moments *q, size_t begin, size_t n)
{
    float m[OPTIM_BLOCK], v[OPTIM_BLOCK];
    const size_t block = begin / OPTIM_BLOCK;
    for (size_t i = 0; i < n; i++) {
        m[i] = nf4_dynamic8[q->cm[begin + i]] * q->max_m[block];
        v[i] = o->unsigned_map[q->cv[begin + i]] * q->max_v[block];
    }
    update(k, t->p + begin, t->g + begin, m, v, n);
    encode(o, m, v, n, q->cm + begin, q->cv + begin, &q->max_m[block], &q->max_v[block]);
}

static void step_pieces(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct step *s = arg;
    const struct optim *o = s->o;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const struct piece *p = &o->pieces[i];
        const struct optim_tensor *t = &o->tensors[p->tensor];
        const struct moments *q = &o->moments[p->tensor];
        const double rate = s->lr * t->lr_scale;
        const struct rates k = { .keep = (float)(1.0 - rate * o->weight_decay),
                                 .beta1 = (float)o->beta1,
                                 .one_minus_beta1 = (float)(1.0 - o->beta1),
                                 .beta2 = (float)o->beta2,
                                 .one_minus_beta2 = (float)(1.0 - o->beta2),
                                 .size = (float)(rate / s->bias1),
                                 .bias2_root = (float)s->bias2_root,
                                 .eps = (float)o->eps };
        if (q->m != NULL) {
            update(&k, t->p + p->begin, t->g + p->begin, q->m + p->begin, q->v + p->begin, p->n);
            continue;
        }
        for (size_t at = 0; at < p->n; at += OPTIM_BLOCK)
            update_8bit(o, &k, t, q, p->begin + at,
                        p->n - at < OPTIM_BLOCK ? p->n - at : OPTIM_BLOCK);
    }
}

/* By squaring: libm's pow() may differ from version to version. */
static double power(double x, int64_t n)
{
    double y = 1;
    for (; n > 0; n /= 2, x *= x)
        if (n % 2 != 0)
            y *= x;
    return y;
}

void optim_step(struct optim *o, const struct compute *c, double lr)
{
    o->step++;
    struct step s = { .o = o,
                      .lr = lr,
                      .bias1 = 1.0 - power(o->beta1, o->step),
                      .bias2_root = sqrt(1.0 - power(o->beta2, o->step)) };
    pool_run(c->pool, (int64_t)o->npieces, 1, step_pieces, &s);
}

/* --- saving ----------------------------------------------------------------------------------- */
/* "OPTM", version 1, step, number of tensors; per tensor its size and whether it has codes; then
 * its moments in the order of parts_of(). */
static const char magic[8] = { 'O', 'P', 'T', 'M', 1, 0, 0, 0 };
struct head {
    uint64_t step, tensors;
};
struct tensor_head {
    uint64_t n, is_8bit;
};

struct part {
    void *data;
    size_t bytes;
    bool floats;
    float least; /* what is smaller is damaged */
};

static int parts_of(const struct moments *m, size_t n, struct part ret[4])
{
    const size_t all = n * sizeof(float), blocks = blocks_of(n) * sizeof(float);
    if (m->m != NULL) {
        ret[0] = (struct part){ m->m, all, true, -FLT_MAX };
        ret[1] = (struct part){ m->v, all, true, 0 };
        return 2;
    }
    ret[0] = (struct part){ m->cm, n, false, 0 };
    ret[1] = (struct part){ m->cv, n, false, 0 };
    ret[2] = (struct part){ m->max_m, blocks, true, 0 };
    ret[3] = (struct part){ m->max_v, blocks, true, 0 };
    return 4;
}

size_t optim_state_bytes(const struct optim *o)
{
    size_t bytes = sizeof magic + sizeof(struct head);
    for (size_t t = 0; t < o->n; t++) {
        const bool codes = o->moments[t].m == NULL;
        bytes +=
            sizeof(struct tensor_head) +
            optim_moment_bytes(codes ? TRAIN_MOMENTS_8BIT : TRAIN_MOMENTS_F32, o->tensors[t].n);
    }
    return bytes;
}

int optim_save(const struct optim *o, struct buf *ret, struct err *err)
{
    const size_t before = ret->len;
    const struct head head = { (uint64_t)o->step, o->n };
    int rc = buf_add(ret, magic, sizeof magic);
    if (rc == ERR_OK)
        rc = buf_add(ret, &head, sizeof head);
    for (size_t t = 0; t < o->n && rc == ERR_OK; t++) {
        const struct tensor_head th = { o->tensors[t].n, o->moments[t].m == NULL };
        struct part parts[4];
        const int n = parts_of(&o->moments[t], o->tensors[t].n, parts);
        rc = buf_add(ret, &th, sizeof th);
        for (int i = 0; i < n && rc == ERR_OK; i++)
            rc = buf_add(ret, parts[i].data, parts[i].bytes);
    }
    if (rc != ERR_OK) {
        ret->len = before;
        return err_set(err, rc, "no room for the optimiser's state");
    }
    return ERR_OK;
}

/* Reads what optim_save() wrote; with `apply` false it only looks whether it is all right. */
static int read_state(struct optim *o, struct train_bytes *b, bool apply, struct err *err)
{
    static const char *const damaged = "the optimiser's saved state is damaged";
    char m[sizeof magic];
    struct head head;
    if (!train_bytes_take(b, m, sizeof m) || memcmp(m, magic, sizeof m) != 0 ||
        !train_bytes_take(b, &head, sizeof head) || head.step > INT64_MAX - 1)
        return err_set(err, ERR_INVALID, "%s", damaged);
    if (head.tensors != o->n)
        return err_set(err, ERR_INVALID, "the optimiser's saved state has %llu tensors, not %zu",
                       (unsigned long long)head.tensors, o->n);
    for (size_t t = 0; t < o->n; t++) {
        struct tensor_head th;
        if (!train_bytes_take(b, &th, sizeof th))
            return err_set(err, ERR_INVALID, "%s", damaged);
        if (th.n != o->tensors[t].n || th.is_8bit != (o->moments[t].m == NULL))
            return err_set(err, ERR_INVALID,
                           "tensor %zu of the optimiser's saved state is another one", t);
        struct part parts[4];
        const int n = parts_of(&o->moments[t], o->tensors[t].n, parts);
        for (int i = 0; i < n; i++) {
            const void *from = train_bytes_skip(b, parts[i].bytes);
            if (from == NULL ||
                (parts[i].floats &&
                 !train_bytes_floats_ok(from, parts[i].bytes / sizeof(float), parts[i].least)))
                return err_set(err, ERR_INVALID, "%s", damaged);
            if (apply)
                memcpy(parts[i].data, from, parts[i].bytes);
        }
    }
    if (apply)
        o->step = (int64_t)head.step;
    return ERR_OK;
}

int optim_restore(struct optim *o, const void **at, size_t *left, struct err *err)
{
    struct train_bytes b = { *at, *left };
    int rc = read_state(o, &b, false, err);
    if (rc != ERR_OK)
        return rc;
    b = (struct train_bytes){ *at, *left };
    rc = read_state(o, &b, true, err);
    *at = b.at;
    *left = b.left;
    return rc;
}

/* --- the learning rate ----------------------------------------------------------------------- */
/* cos(pi x), 0 <= x <= 1, by its series around 0 or around 1. */
static double cos_pi(double x)
{
    if (x > 0.5)
        return -cos_pi(1.0 - x);
    const double y = x * 3.14159265358979324, y2 = y * y;
    double sum = 1;
    for (int k = 22; k > 0; k -= 2)
        sum = 1.0 - y2 / (double)(k * (k - 1)) * sum;
    return sum;
}

double optim_lr(const struct train_opts *o, int64_t step, int64_t steps)
{
    const double total = (double)steps, done = (double)(step - 1);
    double warm = o->warmup < 1 ? ceil(o->warmup * total) : floor(o->warmup);
    if (warm > total)
        warm = total;
    if ((double)step <= warm)
        return o->lr * ((double)step / warm);
    if (step > steps)
        return o->schedule == TRAIN_CONSTANT ? o->lr : 0;
    switch (o->schedule) {
    case TRAIN_CONSTANT:
        break;
    case TRAIN_LINEAR:
        return o->lr * ((total - done) / (total - warm));
    case TRAIN_COSINE:
        return o->lr * 0.5 * (1.0 + cos_pi((done - warm) / (total - warm)));
    }
    return o->lr;
}
