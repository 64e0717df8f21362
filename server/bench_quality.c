/* bench_quality.c - what the arithmetic costs in perplexity: a trained model of 260 thousand parameters and
 * its trained adapters, beside what PyTorch and PEFT compute in fp32 from the same NF4 weights.
 *
 * The numbers are those of `lorad perplexity`, which runs as a process of its own. */
#include "server/bench_parts.h"
#include "server/bench_stage.h"

#include "engine/base.h"
#include "engine/util.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* The environment without this program's own settings, which would become options of what is measured;
 * the words are not copied.  free() it; NULL: no memory. */
static char **plain_environment(void)
{
    size_t n = 0, kept = 0;
    while (environ[n] != NULL)
        n++;
    char **plain = calloc(n + 1, sizeof *plain);
    for (size_t i = 0; i < n && plain != NULL; i++)
        if (strncmp(environ[i], "LORAD_", 6) != 0)
            plain[kept++] = environ[i];
    return plain;
}

/* The JSON object that `lorad ARGS` prints; new. */
static int run_self(const char *const *args, json_t **ret, struct err *err)
{
    posix_spawn_file_actions_t actions;
    json_error_t bad;
    int fd[2], status = 0;
    pid_t pid;
    char **env = plain_environment();
    if (env == NULL)
        return err_nomem(err);
    if (pipe(fd) != 0) {
        free(env);
        return err_set(err, ERR_IO, "cannot make a pipe: %m");
    }
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fd[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, fd[0]);
    posix_spawn_file_actions_addclose(&actions, fd[1]);
    const int failed = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, (char *const *)args, env);
    posix_spawn_file_actions_destroy(&actions);
    free(env);
    close(fd[1]);
    if (failed != 0) {
        close(fd[0]);
        return err_set(err, ERR_IO, "cannot start lorad %s: %s", args[1], strerror(failed));
    }
    json_t *j = json_loadfd(fd[0], 0, &bad);
    close(fd[0]);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (j == NULL || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        json_decref(j);
        return err_set(err, ERR_INTERNAL, "lorad %s failed", args[1]);
    }
    *ret = j;
    return ERR_OK;
}

struct quality {
    struct bench *b;
    struct stage_path base;
    char tokens[1100];
    double worst[3]; /* [enum precision]: largest distance from the reference in percent */
};

/* One model by one precision beside its reference. */
static int measure(struct quality *q, const char *name, const char *adapter, enum precision p, double want,
                   struct err *err)
{
    json_t *j = NULL;
    const char *args[] = { "lorad", "perplexity", "--base", q->base.s, "--precision", precision_name(p),
                           "--tokens", q->tokens, adapter != NULL ? "--adapter" : NULL, adapter, NULL };
    int rc = run_self(args, &j, err);
    if (rc != ERR_OK)
        return rc;
    struct bench_series s = { .name = "", .unit = "ppl", .n = 1 };
    struct bench_series ref = { .name = "ppl, PyTorch fp32", .unit = "ppl", .n = 1, .v = { want } };
    s.v[0] = json_number_value(json_object_get(j, "ppl"));
    json_decref(j);
    const double off = 100 * fabs(s.v[0] / want - 1);
    q->worst[p] = fmax(q->worst[p], off);
    return bench_row(q->b, &s, &ref, 1, err, "quality.%s.%s", name, precision_name(p));
}

static int measure_all(struct quality *q, const char *shared, const json_t *reference, struct err *err)
{
    static const struct {
        const char *name, *adapter, *run;
    } models[] = {
        { "base", NULL, NULL },
        { "lora", "lora_r8", "lora_r8 seed 1" },
        { "adalora", "adalora_r8", "adalora_r8 seed 1" },
        { "dora", "dora_r8", "dora_r8 seed 1" },
    };
    struct bench *b = q->b;
    int rc = ERR_OK;
    for (int p = PREC_FAST; p <= PREC_EXACT && rc == ERR_OK; p++) {
        for (size_t i = 0; i < 4 && b->precisions[p] && rc == ERR_OK; i++) {
            char adapter[1100];
            const json_t *run = models[i].run == NULL
                                    ? NULL : json_object_get(json_object_get(reference, "runs"), models[i].run);
            const double want = json_number_value(run != NULL ? json_object_get(run, "ppl")
                                                              : json_object_get(reference, "ppl_base_nf4"));
            snprintf(adapter, sizeof adapter, "%s/adapters/stories260K/%s", shared,
                     models[i].adapter != NULL ? models[i].adapter : "");
            rc = want > 0 ? measure(q, models[i].name, models[i].adapter != NULL ? adapter : NULL,
                                    (enum precision)p, want, err)
                          : err_set(err, ERR_INVALID, "reference.json has no perplexity of %s", models[i].name);
        }
        if (b->precisions[p] && rc == ERR_OK)
            rc = bench_number(b, q->worst[p], "% off", NULL, err, "quality.%s", precision_name((enum precision)p));
    }
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    struct quality q = { .b = b };
    struct stage stage;
    char path[1100];
    json_error_t bad;
    if (b->shared == NULL) {
        bench_skip(b, "quality", "the reference models are not there; --shared DIR says where");
        return ERR_OK;
    }
    snprintf(path, sizeof path, "%.1000s/adapters/stories260K/reference.json", b->shared);
    json_t *reference = json_load_file(path, 0, &bad);
    if (reference == NULL) {
        bench_skip(b, "quality", "%.150s: %.80s", path, bad.text);
        return ERR_OK;
    }
    snprintf(q.tokens, sizeof q.tokens, "%.1000s/adapters/stories260K/tokens.safetensors:held", b->shared);
    snprintf(path, sizeof path, "%.1000s/models/stories260K", b->shared);
    int rc = stage_open(&stage, err);
    if (rc == ERR_OK) {
        q.base = stage_path(&stage, "b.base");
        rc = base_import(path, q.base.s, NULL, err);
        if (rc == ERR_OK)
            rc = measure_all(&q, b->shared, reference, err);
        stage_close(&stage);
    }
    json_decref(reference);
    return rc;
}

const struct bench_part bench_quality = { "quality", "perplexity of a trained model and its adapters, beside "
                                          "PyTorch's (--shared)", run };
