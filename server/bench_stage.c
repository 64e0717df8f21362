/* bench_stage.c - the folder, and what lies in it. */
#include "server/bench_stage.h"

#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* --- the folder ------------------------------------------------------------------------------- */

/* A shell in a session of its own, so that no signal from the terminal reaches it: reads until this
 * process has ended, then removes the folder. */
static int start_guard(struct stage *s, struct err *err)
{
    static char shell[] = "sh", flag[] = "-c", script[] = "cat >/dev/null; rm -rf -- \"$0\"";
    char *argv[] = { shell, flag, script, s->dir, NULL };
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0)
        return err_set(err, ERR_IO, "no pipe: %s", strerror(errno));
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attr);
    posix_spawn_file_actions_adddup2(&files, fds[0], STDIN_FILENO);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSID);
    const int rc = posix_spawn(&s->guard_pid, "/bin/sh", &files, &attr, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attr);
    close(fds[0]);
    s->guard = fds[1];
    if (rc == 0)
        return ERR_OK;
    close(s->guard);
    return err_set(err, ERR_IO, "/bin/sh does not start: %s", strerror(rc));
}

/* A new folder below TMPDIR or /tmp. */
static int make_folder(char *ret, size_t cap, struct err *err)
{
    const char *tmp = getenv("TMPDIR");
    const int n = snprintf(ret, cap, "%s/lorad-bench-XXXXXX", tmp != NULL && *tmp != '\0' ? tmp : "/tmp");
    if (n < 0 || (size_t)n >= cap)
        return err_set(err, ERR_INVALID, "TMPDIR is too long");
    return mkdtemp(ret) != NULL ? ERR_OK : err_set(err, ERR_IO, "cannot make a folder %s: %m", ret);
}

int stage_open(struct stage *s, struct err *err)
{
    int rc = make_folder(s->dir, sizeof s->dir, err);
    if (rc == ERR_OK && (rc = start_guard(s, err)) != ERR_OK)
        rmdir(s->dir);
    return rc;
}

void stage_close(struct stage *s)
{
    close(s->guard);
    while (waitpid(s->guard_pid, NULL, 0) < 0 && errno == EINTR)
        continue;
}

struct stage_path stage_path(const struct stage *s, const char *name)
{
    struct stage_path p;
    snprintf(p.s, sizeof p.s, "%s/%.200s", s->dir, name);
    return p;
}

bool stage_room(struct bench *b, const struct stage *s, const char *id, size_t disk, size_t memory)
{
    struct statvfs v;
    char need[32], have[32];
    const size_t left = statvfs(s->dir, &v) == 0 ? (size_t)v.f_bavail * v.f_frsize : SIZE_MAX;
    if (left < disk) {
        bench_skip(b, id, "needs %s of disk in %s (TMPDIR), and %s are free", human_bytes(disk, need),
                   s->dir, human_bytes(left, have));
        return false;
    }
    return bench_room(b, id, memory);
}

int stage_each_shape(struct bench *b, int on_disk, int in_memory, size_t more,
                     int (*run)(struct bench *b, const struct stage *s, const struct synthetic_shape *shape,
                                struct err *err),
                     struct err *err)
{
    struct stage st;
    int rc = stage_open(&st, err);
    if (rc != ERR_OK)
        return rc;
    for (int i = 0; i < b->nshapes && rc == ERR_OK; i++) {
        const struct synthetic_shape *s = synthetic_find(b->shapes[i]);
        const size_t base = synthetic_bytes(s);
        char id[BENCH_ID_MAX];
        snprintf(id, sizeof id, "%s.%s", b->part, s->name);
        if (stage_room(b, &st, id, (size_t)on_disk * base, (size_t)in_memory * base + more))
            rc = run(b, &st, s, err);
    }
    stage_close(&st);
    return rc;
}

void stage_remove_db(const char *db)
{
    static const char *const ends[] = { "", "-wal", "-shm", ".pepper" };
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        snprintf(path, sizeof path, "%.*s%s", PATH_MAX - 16, db, ends[i]);
        unlink(path);
    }
}

/* --- samples ---------------------------------------------------------------------------------- */

int stage_sample(struct stage_samples *s, double v, struct err *err)
{
    if (s->n == s->cap) {
        const size_t cap = s->cap ? 2 * s->cap : 256;
        double *p = realloc(s->v, cap * sizeof *p);
        if (p == NULL)
            return err_nomem(err);
        s->v = p;
        s->cap = cap;
    }
    s->v[s->n++] = v;
    return ERR_OK;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double stage_percentile(struct stage_samples *s, double percent)
{
    if (s->n == 0)
        return 0;
    qsort(s->v, s->n, sizeof *s->v, ascending);
    const size_t at = (size_t)ceil((double)s->n * percent / 100);
    return s->v[at > 0 ? at - 1 : 0];
}

void stage_samples_free(struct stage_samples *s)
{
    free(s->v);
    *s = (struct stage_samples){ 0 };
}

/* --- models and adapters ---------------------------------------------------------------------- */

int stage_base(const struct synthetic_shape *shape, const char *path, struct base **ret, struct err *err)
{
    char *tokenizer = stage_tokenizer(shape->V);
    struct base *b = NULL;
    int rc = tokenizer != NULL ? synthetic_base(shape, &b, err) : err_nomem(err);
    if (rc == ERR_OK)
        rc = synthetic_save(b, tokenizer, path, err);
    free(tokenizer);
    if (rc == ERR_OK)
        *ret = b;
    else
        synthetic_free(b);
    return rc;
}

static bool adapts(enum stage_modules which, int module)
{
    switch (which) {
    case STAGE_QV:
        return module == MOD_Q || module == MOD_V;
    case STAGE_ATTENTION:
        return module <= MOD_O;
    default:
        return true;
    }
}

/* Two tensors of a module; returns where the next one begins. */
static uint16_t *describe(struct adapter_src_module *m, const struct arch *arch, int layer, int module,
                          int rank, uint16_t *at)
{
    char path[160] = "";
    adapter_module_path(arch, layer, module, path, sizeof path);
    *m = (struct adapter_src_module){
        .layer = layer, .module = (enum module)module, .path = strdup(path), .rank = rank,
        .init_rank = rank, .alpha = rank, .scaling = 1, .in = adapter_module_in(arch, module),
        .out = adapter_module_out(arch, module), .dtype = DT_BF16, .A = at,
        .B = at + (size_t)rank * (size_t)adapter_module_in(arch, module),
    };
    return at + (size_t)rank * (size_t)(m->in + m->out);
}

/* BF16 around +-0.01, four at a time. */
static void fill_random(uint16_t *p, size_t n, uint64_t seed)
{
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    for (size_t i = 0; i + 4 <= n; i += 4) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        const uint64_t v = (x & 0x80ff80ff80ff80ffu) | 0x3c003c003c003c00u;
        memcpy(p + i, &v, sizeof v);
    }
}

int stage_adapter(const struct arch *arch, enum stage_modules which, int rank, uint64_t seed,
                  struct adapter_src **ret, struct err *err)
{
    static const char config[] = "{\"peft_type\": \"LORA\"}";
    struct adapter_src *a = calloc(1, sizeof *a);
    size_t elements = 0, n = 0;
    for (int m = 0; m < MOD_COUNT; m++)
        if (arch_has_module(arch, (enum module)m) && adapts(which, m)) {
            elements += (size_t)rank * (size_t)(adapter_module_in(arch, m) + adapter_module_out(arch, m));
            n++;
        }
    elements *= (size_t)arch->L;
    uint16_t *data = malloc((elements + 4) * sizeof *data);
    if (a == NULL || data == NULL ||
        (a->modules = calloc((size_t)arch->L * n, sizeof *a->modules)) == NULL) {
        free(a);
        free(data);
        return err_nomem(err);
    }
    fill_random(data, elements + 4, seed);
    a->own = data;
    bool ok = true;
    for (int layer = 0; layer < arch->L; layer++)
        for (int m = 0; m < MOD_COUNT; m++)
            if (arch_has_module(arch, (enum module)m) && adapts(which, m)) {
                data = describe(&a->modules[a->nmodules], arch, layer, m, rank, data);
                ok = ok && a->modules[a->nmodules++].path != NULL;
            }
    a->method = METHOD_LORA;
    a->config = strdup(config);
    a->config_len = sizeof config - 1;
    a->rank_min = a->rank_max = rank;
    a->alpha = rank;
    a->params = elements;
    a->bytes = elements * sizeof *data;
    if (!ok || a->config == NULL) {
        adapter_src_free(a);
        return err_nomem(err);
    }
    adapter_src_hash(a, a->hash);
    *ret = a;
    return ERR_OK;
}

struct stage_name stage_name(int i)
{
    struct stage_name n;
    snprintf(n.s, sizeof n.s, "a%05d", i);
    return n;
}

int stage_fill(const struct base *base, const char *db, enum stage_modules which, int rank, int first, int n,
               struct err *err)
{
    const struct store_put_opts o = { .activate = true, .base_hash_hex = base->hash_hex,
                                      .origin = "upload" };
    struct store *st = NULL;
    int rc = store_open(db, &st, err);
    for (int i = first; i < first + n && rc == ERR_OK; i++) {
        struct adapter_src *a = NULL;
        struct store_version v;
        bool is_new;
        rc = stage_adapter(&base->arch, which, rank, (uint64_t)i, &a, err);
        if (rc == ERR_OK)
            rc = store_adapter_put(st, STORE_TENANT_DEFAULT, stage_name(i).s, a, &o, &v, &is_new, err);
        if (rc == ERR_OK)
            store_version_free(&v);
        adapter_src_free(a);
    }
    store_close(st);
    return rc;
}
