/* bench_load.c - how long a base file takes from the page cache into memory. */
#include "server/bench_parts.h"
#include "server/bench_stage.h"

#include "engine/base.h"
#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>

struct load {
    struct stage_path path;
    size_t bytes;    /* in memory */
    bool use_mmap;
};

static int load_once(void *arg, double *ret, struct err *err)
{
    struct load *l = arg;
    struct base *b;
    const double start = now_mono();
    int rc = base_load(l->path.s, PREC_FAST, l->use_mmap, &b, err);
    *ret = now_mono() - start;
    if (rc != ERR_OK)
        return rc;
    l->bytes = b->bytes;
    base_free(b);
    return ERR_OK;
}

/* `cat` of the file to nowhere, into memory that is there already: what loading cannot be quicker than. */
static int read_once(void *arg, double *ret, struct err *err)
{
    const struct load *l = arg;
    enum { PIECE = 1 << 20 };
    char *piece = malloc(PIECE);
    FILE *f = fopen(l->path.s, "r");
    int rc = piece != NULL && f != NULL ? ERR_OK : err_set(err, ERR_IO, "cannot read %s: %m", l->path.s);
    const double start = now_mono();
    if (f != NULL)
        setvbuf(f, NULL, _IONBF, 0);
    while (rc == ERR_OK && fread(piece, 1, PIECE, f) == PIECE)
        ;
    *ret = now_mono() - start;
    if (f != NULL)
        fclose(f);
    free(piece);
    return rc;
}

/* Weights of the blocks, the embedding and the head. */
static double parameters(const struct synthetic_shape *s)
{
    const double attn = 2.0 * s->D * s->H * s->hd + 2.0 * s->D * s->G * s->hd;
    return s->L * (attn + 3.0 * s->D * s->F) + 2.0 * s->V * s->D;
}

static int measure(struct bench *b, const struct synthetic_shape *s, struct load *l, struct err *err)
{
    struct load mapped = *l;
    mapped.use_mmap = true;
    struct bench_series series[] = {
        { .name = "s reading the file", .unit = "s", .measure = read_once, .arg = l },
        { .name = "s loading", .unit = "s", .measure = load_once, .arg = l },
        { .name = "s mapping", .unit = "s", .measure = load_once, .arg = &mapped },
    };
    int rc = bench_measure(b, series, 3, err);
    if (rc == ERR_OK)
        rc = bench_row(b, &series[1], &series[0], 1, err, "load.%s", s->name);
    if (rc == ERR_OK)
        rc = bench_row(b, &series[2], &series[0], 1, err, "load.%s.mmap", s->name);
    if (rc == ERR_OK)
        rc = bench_number(b, (double)l->bytes / parameters(s), "bytes", NULL, err,
                          "load.%s.bytes_per_parameter", s->name);
    return rc;
}

static int load_shape(struct bench *b, const struct synthetic_shape *shape, struct err *err)
{
    struct load l = { 0 };
    struct stage stage;
    struct base *base = NULL;
    char id[BENCH_ID_MAX];
    const size_t bytes = synthetic_bytes(shape);
    snprintf(id, sizeof id, "load.%s", shape->name);
    int rc = stage_open(&stage, err);
    if (rc != ERR_OK)
        return rc;
    if (stage_room(b, &stage, id, bytes + bytes / 8, 3 * bytes)) { /* the file may lie in memory too */
        l.path = stage_path(&stage, "b.base");
        rc = synthetic_base(shape, &base, err);
        if (rc == ERR_OK)
            rc = synthetic_save(base, NULL, l.path.s, err);
        synthetic_free(base);
        if (rc == ERR_OK)
            rc = measure(b, shape, &l, err);
    }
    stage_close(&stage);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    int rc = ERR_OK;
    for (int i = 0; i < b->nshapes && rc == ERR_OK; i++)
        rc = load_shape(b, synthetic_find(b->shapes[i]), err);
    return rc;
}

const struct bench_part bench_load = { "load", "a base file from the page cache into memory", run };
