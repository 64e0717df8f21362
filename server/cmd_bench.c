/* cmd_bench.c - lorad bench: options, parts in turn, the end. */
#include "server/bench.h"
#include "server/cmd.h"
#include "server/cmd_db.h"
#include "server/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct opt table[] = {
    { "part", 0, "NAME", NULL, "measure this part; may be repeated; all if none is named", true },
    { "shape", 0, "LIST", "135m,0.5b,1.1b", "shapes of the bases, with commas between", false },
    { "precision", 0, "fast|exact|both", "both", "how linear layers multiply", false },
    { "kernel", 0, "auto|scalar|avx2|avx512", "auto", "instruction set", false },
    { "threads", 't', "N", "0", "0: one per available CPU", false },
    { "rounds", 0, "N", NULL, "how often each row is measured [7, with --quick 3]", false },
    { "quick", 0, NULL, NULL, "shorter rounds, fewer sizes: less exact", false },
    { "shared", 0, "DIR", NULL, "folder with reference models, for part quality", false },
    { "peer", 0, "ROW=NUMBER", NULL, "what another program reached; may be repeated", true },
    { "json", 0, "FILE", NULL, "write everything there too, raw values included; -: to stdout, no table", false },
    { "list", 0, NULL, NULL, "list parts, shapes and the rows that compare with a peer", false },
    { NULL, 0, NULL, NULL, NULL, false },
};

static const struct bench_part *find_part(const char *name)
{
    for (int i = 0; bench_parts[i] != NULL; i++)
        if (strcmp(bench_parts[i]->name, name) == 0)
            return bench_parts[i];
    return NULL;
}

static void print_list(void)
{
    printf("parts:\n");
    for (int i = 0; bench_parts[i] != NULL; i++)
        printf("  %-10s %s\n", bench_parts[i]->name, bench_parts[i]->about);
    printf("shapes:\n");
    for (int i = 0; synthetic_nth(i) != NULL; i++) {
        const struct synthetic_shape *s = synthetic_nth(i);
        printf("  %-10s %d layers of %d, %d heads, %d of keys and values, %d in the MLP, vocabulary %d\n",
               s->name, s->L, s->D, s->H, s->G, s->F, s->V);
    }
    printf("rows that compare with a peer (--peer ROW=NUMBER):\n");
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++)
        if (t->peer_of != NULL)
            printf("  %-28s %s\n", t->id, t->what);
}

/* The same for programs. */
static int print_list_json(void)
{
    json_t *parts = json_array(), *shapes = json_array(), *targets = json_array();
    for (int i = 0; bench_parts[i] != NULL; i++)
        json_array_append_new(parts, json_pack("{s:s, s:s}", "name", bench_parts[i]->name, "about",
                                               bench_parts[i]->about));
    for (int i = 0; synthetic_nth(i) != NULL; i++) {
        const struct synthetic_shape *s = synthetic_nth(i);
        json_array_append_new(shapes, json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "name", s->name,
                                                "L", s->L, "D", s->D, "H", s->H, "G", s->G, "hd", s->hd, "F",
                                                s->F, "V", s->V));
    }
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++)
        json_array_append_new(targets, json_pack("{s:s, s:s, s:s, s:f, s:b, s:b, s:b}", "id", t->id, "part",
                                                 t->part, "what", t->what, "target", t->bound, "at_most",
                                                 t->at_most, "of_ratio", t->of_ratio, "peer",
                                                 t->peer_of != NULL));
    json_t *all = json_pack("{s:o, s:o, s:o}", "parts", parts, "shapes", shapes, "targets", targets);
    const int failed = all == NULL || json_dumpf(all, stdout, JSON_INDENT(1)) != 0;
    json_decref(all);
    putchar('\n');
    return failed ? fail(1, "the list cannot be written") : 0;
}

static int list(const struct opts *o)
{
    const char *json = opt_str(o, "json");
    if (json != NULL && strcmp(json, "-") != 0)
        return fail(2, "--list goes to standard output: --json -");
    if (json == NULL)
        print_list();
    else if (print_list_json() != 0)
        return 1;
    return output_done();
}

/* --- options ----------------------------------------------------------------------------------- */
static bool has_shape(const struct bench *b, const char *name)
{
    for (int i = 0; i < b->nshapes; i++)
        if (strcmp(b->shapes[i], name) == 0)
            return true;
    return false;
}

/* Each shape once, however often it is named.  0, or 2 after a sentence. */
static int read_shapes(const char *text, struct bench *b)
{
    for (const char *at = text; *at != '\0';) {
        const size_t n = strcspn(at, ",");
        const struct synthetic_shape *s = NULL;
        for (int i = 0; synthetic_nth(i) != NULL; i++)
            if (strlen(synthetic_nth(i)->name) == n && memcmp(synthetic_nth(i)->name, at, n) == 0)
                s = synthetic_nth(i);
        if (s == NULL)
            return fail(2, "there is no shape \"%.*s\"; --list shows them", (int)(n < 64 ? n : 64), at);
        if (!has_shape(b, s->name)) {
            if (b->nshapes == BENCH_SHAPES_MAX)
                return fail(2, "--shape names more than %d shapes", BENCH_SHAPES_MAX);
            b->shapes[b->nshapes++] = s->name;
        }
        at += n + (at[n] == ',');
    }
    return b->nshapes > 0 ? 0 : fail(2, "--shape names no shape");
}

static int read_precision(const char *text, struct bench *b)
{
    if (strcmp(text, "fast") != 0 && strcmp(text, "exact") != 0 && strcmp(text, "both") != 0)
        return fail(2, "--precision must be fast, exact or both, not %s", text);
    b->precisions[PREC_FAST] = strcmp(text, "exact") != 0;
    b->precisions[PREC_EXACT] = strcmp(text, "fast") != 0;
    return 0;
}

/* Names on the command line and of --part: those, in the table's order. */
static int read_parts(const struct opts *o, bool *wanted)
{
    const int nargs = opts_nargs(o);
    const int named = nargs + (int)opt_count(o, "part");
    for (int i = 0; i < named; i++) {
        const char *name = i < nargs ? opts_arg(o, i) : opt_nth(o, "part", (size_t)(i - nargs));
        if (find_part(name) == NULL)
            return fail(2, "there is no part \"%s\"; --list shows them", name);
    }
    for (int p = 0; bench_parts[p] != NULL; p++) {
        wanted[p] = named == 0;
        for (int i = 0; i < named; i++)
            if (strcmp(bench_parts[p]->name,
                       i < nargs ? opts_arg(o, i) : opt_nth(o, "part", (size_t)(i - nargs))) == 0)
                wanted[p] = true;
    }
    return 0;
}

static int read_options(const struct opts *o, struct bench *b, bool *wanted, struct err *err)
{
    int64_t threads = 0;
    b->quick = opt_flag(o, "quick");
    b->shared = opt_str(o, "shared");
    b->min_seconds = b->quick ? 0.03 : 0.1;
    int64_t rounds = b->quick ? 3 : 7;
    if (!opt_int(o, "threads", 0, 1024, &threads) || !opt_int(o, "rounds", 1, BENCH_ROUNDS_MAX, &rounds))
        return 2;
    b->rounds = (int)rounds;
    int code = read_parts(o, wanted);
    if (code == 0)
        code = read_shapes(opt_str(o, "shape"), b);
    if (code == 0)
        code = read_precision(opt_str(o, "precision"), b);
    for (size_t i = 0; i < opt_count(o, "peer") && code == 0; i++)
        if (bench_rows_peer(b->rows, opt_nth(o, "peer", i), err) != ERR_OK)
            code = fail(2, "%s", err->msg);
    if (code == 0 && isa_select(opt_str(o, "kernel"), &b->compute.isa, err) != ERR_OK)
        code = fail(2, "%s", err->msg);
    if (code == 0 && pool_create((int)threads, &b->compute.pool, err) != ERR_OK)
        code = fail(1, "%s", err->msg);
    return code;
}

/* --- the run ----------------------------------------------------------------------------------- */
/* The file is opened before the minutes of measuring, so that a wrong path is not found out after. */
static int check_json(const char *path)
{
    if (path == NULL || strcmp(path, "-") == 0)
        return 0;
    FILE *f = fopen(path, "a");
    if (f == NULL)
        return fail(1, "cannot write %s: %m", path);
    fclose(f);
    return 0;
}

static int run_parts(struct bench *b, const bool *wanted)
{
    int code = 0;
    for (int i = 0; bench_parts[i] != NULL; i++) {
        struct err err = { 0 };
        if (!wanted[i])
            continue;
        b->part = bench_parts[i]->name;
        if (bench_parts[i]->run(b, &err) != ERR_OK) {
            bench_skip(b, b->part, "it failed: %.200s", err.msg);
            code = fail(1, "part %s: %s", b->part, err.msg);
        }
    }
    return code;
}

static int run(const struct opts *o, struct bench *b, bool *wanted)
{
    struct err err = { 0 };
    const char *json = opt_str(o, "json");
    int code = read_options(o, b, wanted, &err);
    if (code == 0)
        code = check_json(json);
    if (code != 0)
        return code;
    json_t *machine = bench_machine(b);
    if (machine == NULL)
        return fail(1, "out of memory");
    bench_rows_print(b->rows, json == NULL || strcmp(json, "-") != 0);
    bench_out_begin(b, machine);
    code = run_parts(b, wanted);
    int rc = bench_out_end(b, &err);
    if (rc == ERR_OK && json != NULL)
        rc = bench_out_json(b, machine, json, &err);
    json_decref(machine);
    if (rc != ERR_OK)
        return fail(1, "%s", err.msg);
    return code == 0 ? output_done() : code;
}

int cmd_bench(int argc, char **argv)
{
    int code, nparts = 0;
    struct bench b = { 0 };
    struct opts *o = opts_parse(
        argc, argv, table, "bench [PART...] [options]",
        "Measures this machine and this program: memory, kernels, decoding, prompts, batches of many\n"
        "adapters, training, loading.  Every row is repeated in turn with its reference; targets are\n"
        "those of docs/performance.md.", 0, -1, &code);
    if (o == NULL)
        return code;
    while (bench_parts[nparts] != NULL)
        nparts++;
    bool *wanted = calloc((size_t)nparts + 1, sizeof *wanted);
    b.rows = bench_rows_new();
    if (opt_flag(o, "list"))
        code = list(o);
    else
        code = wanted != NULL && b.rows != NULL ? run(o, &b, wanted) : fail(1, "out of memory");
    bench_rows_free(b.rows);
    pool_destroy(b.compute.pool);
    free(wanted);
    opts_free(o);
    return code;
}
