/* bench_out.c - the rows: collected, judged, printed, written as JSON. */
#include "server/bench.h"

#include "engine/util.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PEERS_MAX = 64 };
static const double FOREIGN_LIMIT = 0.05; /* a row with more is marked */

struct peer {
    const struct bench_target *target;
    double value;
};

struct bench_rows {
    json_t *rows, *skipped; /* arrays, as in the file */
    struct peer peers[PEERS_MAX];
    int npeers;
    bool print;
    int met, missed;
};

struct bench_rows *bench_rows_new(void)
{
    struct bench_rows *r = calloc(1, sizeof *r);
    if (r == NULL)
        return NULL;
    r->rows = json_array();
    r->skipped = json_array();
    r->print = true;
    if (r->rows != NULL && r->skipped != NULL)
        return r;
    bench_rows_free(r);
    return NULL;
}

void bench_rows_free(struct bench_rows *r)
{
    if (r == NULL)
        return;
    json_decref(r->rows);
    json_decref(r->skipped);
    free(r);
}

void bench_rows_print(struct bench_rows *r, bool print) { r->print = print; }

int bench_rows_peer(struct bench_rows *r, const char *arg, struct err *err)
{
    const char *eq = strchr(arg, '=');
    char id[BENCH_ID_MAX], *end;
    if (eq == NULL || eq == arg || (size_t)(eq - arg) >= sizeof id)
        return err_set(err, ERR_INVALID, "--peer %.200s is not ROW=NUMBER", arg);
    memcpy(id, arg, (size_t)(eq - arg));
    id[eq - arg] = '\0';
    const struct bench_target *t = bench_target_find(id);
    if (t == NULL || t->peer_of == NULL)
        return err_set(err, ERR_INVALID, "--peer %s: no row of that name compares with a peer; --list "
                       "shows those that do", id);
    const double v = strtod(eq + 1, &end);
    if (end == eq + 1 || *end != '\0' || !isfinite(v) || v <= 0)
        return err_set(err, ERR_INVALID, "--peer %s needs a number above 0, not %.100s", id, eq + 1);
    for (int i = 0; i < r->npeers; i++)
        if (r->peers[i].target == t)
            return err_set(err, ERR_INVALID, "--peer %s is given twice", id);
    if (r->npeers == PEERS_MAX)
        return err_set(err, ERR_INVALID, "more than %d peers", PEERS_MAX);
    r->peers[r->npeers++] = (struct peer){ t, v };
    return ERR_OK;
}

/* --- the table --------------------------------------------------------------------------------- */
/* Four digits that mean something. */
static const char *number(double v, char ret[32])
{
    const double a = fabs(v);
    snprintf(ret, 32, a >= 1000 ? "%.0f" : a >= 100 ? "%.1f" : a >= 10 ? "%.2f" : a >= 0.1 ? "%.3f" : "%.3g",
             v);
    return ret;
}

void bench_out_begin(struct bench *b, const json_t *machine)
{
    char mem[32];
    if (!b->rows->print)
        return;
    printf("%s: %lld CPUs, %lld threads, %s kernels, %s of memory, huge pages %s, %s, OpenBLAS %s, load %s\n",
           json_string_value(json_object_get(machine, "cpu")),
           (long long)json_integer_value(json_object_get(machine, "cpus")),
           (long long)json_integer_value(json_object_get(machine, "threads")),
           json_string_value(json_object_get(machine, "kernels")),
           human_bytes((size_t)json_integer_value(json_object_get(machine, "memory")), mem),
           json_string_value(json_object_get(machine, "huge_pages")),
           json_string_value(json_object_get(machine, "compiler")),
           json_string_value(json_object_get(machine, "openblas")),
           json_string_value(json_object_get(machine, "load")));
    printf("%-38s %9s %-9s %5s  %-26s %7s  %s\n", "row", "value", "unit", "+-", "reference", "ratio",
           "target");
    fflush(stdout);
}

static const char *or_less(const struct bench_target *t) { return t->at_most ? "<=" : ">="; }

static const char *verdict(const struct bench_target *t, double x)
{
    return t == NULL ? "no target" : bench_target_met(t, x) ? "met" : "MISSED";
}

static void print_row(const json_t *row, const struct bench_target *t)
{
    char value[32], ref[32], ratio[32], bound[32], left[80] = "", right[32] = "";
    const json_t *reference = json_object_get(row, "reference");
    const double foreign = json_real_value(json_object_get(row, "foreign"));
    if (reference != NULL) {
        snprintf(left, sizeof left, "%s %.40s", number(json_number_value(json_object_get(reference, "value")), ref),
                 json_string_value(json_object_get(reference, "name")));
        snprintf(right, sizeof right, "%s", number(json_number_value(json_object_get(row, "ratio")), ratio));
    }
    printf("%-38s %9s %-9s %4.1f%%  %-26s %7s", json_string_value(json_object_get(row, "id")),
           number(json_number_value(json_object_get(row, "value")), value),
           json_string_value(json_object_get(row, "unit")),
           100 * json_real_value(json_object_get(row, "spread")), left, right);
    if (t != NULL)
        printf("  %s %s: %s", or_less(t), number(t->bound, bound),
               json_string_value(json_object_get(row, "verdict")));
    if (foreign > FOREIGN_LIMIT)
        printf("  [others took %.0f %% of the CPU time]", 100 * foreign);
    printf("\n");
    fflush(stdout);
}

/* --- rows -------------------------------------------------------------------------------------- */
static json_t *numbers(const double *v, int n)
{
    json_t *a = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(a, json_real(v[i]));
    return a;
}

/* Takes `row`, which may be NULL; `ratio` 0: it has none. */
static int add_row(struct bench *b, json_t *row, const char *id, double value, double ratio, struct err *err)
{
    const struct bench_target *t = bench_target_find(id);
    struct bench_rows *r = b->rows;
    if (t != NULL && row != NULL) {
        const double x = t->of_ratio ? ratio : value;
        json_object_set_new(row, "target", json_real(t->bound));
        json_object_set_new(row, "at_most", json_boolean(t->at_most));
        json_object_set_new(row, "of_ratio", json_boolean(t->of_ratio));
        json_object_set_new(row, "what", json_string(t->what));
        *(bench_target_met(t, x) ? &r->met : &r->missed) += 1;
    }
    if (row == NULL ||
        json_object_set_new(row, "verdict", json_string(verdict(t, t && t->of_ratio ? ratio : value))) != 0 ||
        json_array_append_new(r->rows, row) != 0)
        return err_nomem(err);
    if (r->print)
        print_row(row, t);
    return ERR_OK;
}

/* Rows that divide this one by what the user says of a peer. */
static int add_peers(struct bench *b, const char *of, const char *unit, double value, double foreign,
                     struct err *err)
{
    int rc = ERR_OK;
    for (int i = 0; i < b->rows->npeers && rc == ERR_OK; i++) {
        const struct peer *p = &b->rows->peers[i];
        if (strcmp(p->target->peer_of, of) != 0)
            continue;
        const double ratio = value / p->value;
        json_t *row = json_pack("{s:s, s:s, s:s, s:f, s:f, s:f, s:{s:s, s:f}, s:f}", "id", p->target->id,
                                "part", b->part, "unit", unit, "value", value, "spread", 0.0, "foreign",
                                foreign, "reference", "name", "the peer, as given", "value", p->value, "ratio", ratio);
        rc = add_row(b, row, p->target->id, value, ratio, err);
    }
    return rc;
}

int bench_row(struct bench *b, const struct bench_series *value, const struct bench_series *ref,
              double scale, struct err *err, const char *fmt, ...)
{
    char id[BENCH_ID_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(id, sizeof id, fmt, ap);
    va_end(ap);
    const double v = bench_median(value->v, value->n);
    double ratio = 0, foreign = value->foreign;
    json_t *row = json_pack("{s:s, s:s, s:s, s:f, s:f, s:o}", "id", id, "part", b->part, "unit",
                            value->unit, "value", v, "spread", bench_spread(value->v, value->n), "values",
                            numbers(value->v, value->n));
    if (ref != NULL && row != NULL) {
        double ratios[BENCH_ROUNDS_MAX];
        const int n = ref->n < value->n ? ref->n : value->n;
        for (int i = 0; i < n; i++)
            ratios[i] = value->v[i] * scale / ref->v[i];
        ratio = bench_median(ratios, n);
        foreign = fmax(foreign, ref->foreign);
        json_object_set_new(row, "reference", json_pack("{s:s, s:s, s:f, s:o}", "name", ref->name, "unit",
                                                        ref->unit, "value", bench_median(ref->v, ref->n),
                                                        "values", numbers(ref->v, ref->n)));
        json_object_set_new(row, "scale", json_real(scale));
        json_object_set_new(row, "ratio", json_real(ratio));
    }
    if (row != NULL)
        json_object_set_new(row, "foreign", json_real(foreign));
    int rc = add_row(b, row, id, v, ratio, err);
    return rc == ERR_OK ? add_peers(b, id, value->unit, v, value->foreign, err) : rc;
}

int bench_number(struct bench *b, double value, const char *unit, const struct bench_series *of,
                 struct err *err, const char *fmt, ...)
{
    struct bench_series s = { .name = "", .unit = unit, .n = 1,
                              .foreign = of != NULL ? of->foreign : 0 };
    char id[BENCH_ID_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(id, sizeof id, fmt, ap);
    va_end(ap);
    s.v[0] = value;
    return bench_row(b, &s, NULL, 0, err, "%s", id);
}

void bench_skip(struct bench *b, const char *id, const char *fmt, ...)
{
    char why[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    json_array_append_new(b->rows->skipped,
                          json_pack("{s:s, s:s, s:s}", "id", id, "part", b->part, "why", why));
    if (b->rows->print)
        printf("%-38s not measured: %s\n", id, why);
}

/* --- the end ----------------------------------------------------------------------------------- */
static const json_t *find_row(const struct bench_rows *r, const char *id)
{
    size_t i;
    json_t *row;
    json_array_foreach(r->rows, i, row)
        if (strcmp(json_string_value(json_object_get(row, "id")), id) == 0)
            return row;
    return NULL;
}

/* What bench_skip() said of the row or of a group that it belongs to, or NULL. */
static const char *why_skipped(const struct bench_rows *r, const char *id)
{
    size_t i;
    json_t *s;
    json_array_foreach(r->skipped, i, s) {
        const char *what = json_string_value(json_object_get(s, "id"));
        const size_t n = strlen(what);
        if (strncmp(what, id, n) == 0 && (id[n] == '\0' || id[n] == '.'))
            return json_string_value(json_object_get(s, "why"));
    }
    return NULL;
}

/* For a target whose id does not begin with its part's name: the first thing that part has skipped. */
static const json_t *skipped_of(const struct bench_rows *r, const struct bench_target *t)
{
    size_t i;
    json_t *s;
    if (strncmp(t->id, t->part, strlen(t->part)) == 0)
        return NULL;
    json_array_foreach(r->skipped, i, s)
        if (strcmp(json_string_value(json_object_get(s, "part")), t->part) == 0)
            return s;
    return NULL;
}

/* Why the row of a target is not there; false if nobody asked for it. */
static bool explain(const struct bench_rows *r, const struct bench_target *t, char ret[256])
{
    const char *row = t->peer_of != NULL ? t->peer_of : t->id, *why = why_skipped(r, row);
    if (why == NULL)
        why = why_skipped(r, t->part);
    const json_t *ours = t->peer_of != NULL ? find_row(r, row) : NULL;
    const json_t *other = why == NULL ? skipped_of(r, t) : NULL;
    if (ours != NULL)
        snprintf(ret, 256, "needs a peer: --peer %s=NUMBER, its %s", t->id,
                 json_string_value(json_object_get(ours, "unit")));
    else if (why != NULL)
        snprintf(ret, 256, "not measured: %s", why);
    else if (other != NULL)
        snprintf(ret, 256, "not measured: %s %s", json_string_value(json_object_get(other, "id")),
                 json_string_value(json_object_get(other, "why")));
    else
        snprintf(ret, 256, "not measured: it was not asked for (part %s)", t->part);
    return ours != NULL || why != NULL || other != NULL;
}

static void print_target(const struct bench_target *t, const json_t *row, const char *why)
{
    char x[32] = "-", bound[32];
    if (row != NULL)
        number(json_number_value(json_object_get(row, t->of_ratio ? "ratio" : "value")), x);
    printf("%-28s %9s  %s %-6s %-7s %s", t->id, x, or_less(t), number(t->bound, bound),
           row != NULL ? json_string_value(json_object_get(row, "verdict")) : "open", t->what);
    if (row == NULL)
        printf(" (%s)", why);
    printf("\n");
}

int bench_out_end(struct bench *b, struct err *err)
{
    struct bench_rows *r = b->rows;
    char why[256] = "";
    int open = 0;
    bool head = false;
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++) {
        const json_t *row = find_row(r, t->id);
        const bool asked = row != NULL || explain(r, t, why);
        if (r->print && asked) {
            if (!head)
                printf("\nthe numbers that lorad is held to:\n");
            head = true;
            print_target(t, row, why);
        }
        if (row != NULL)
            continue;
        open++;
        json_t *j = json_pack("{s:s, s:s, s:s, s:f, s:b, s:b, s:s, s:s}", "id", t->id, "part", t->part,
                              "what", t->what, "target", t->bound, "at_most", t->at_most, "of_ratio",
                              t->of_ratio, "verdict", "open", "why", why);
        if (j == NULL || json_array_append_new(r->rows, j) != 0)
            return err_nomem(err);
    }
    if (r->print)
        printf("%d met, %d MISSED, %d open (of parts that were not asked for, or in need of a peer's figure)\n",
               r->met, r->missed, open);
    return ERR_OK;
}

int bench_out_json(struct bench *b, json_t *machine, const char *path, struct err *err)
{
    char date[32];
    const time_t now = time(NULL);
    struct tm tm;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
    const char *precision = !b->precisions[PREC_EXACT] ? "fast" : b->precisions[PREC_FAST] ? "both" : "exact";
    json_t *all = json_pack("{s:i, s:s, s:O, s:i, s:b, s:s, s:O, s:O}", "format", 1, "date", date, "machine",
                            machine, "rounds", b->rounds, "quick", b->quick, "precision", precision, "rows",
                            b->rows->rows, "skipped", b->rows->skipped);
    if (all == NULL)
        return err_nomem(err);
    FILE *f = strcmp(path, "-") == 0 ? stdout : fopen(path, "w");
    int rc = f != NULL && json_dumpf(all, f, JSON_INDENT(1) | JSON_REAL_PRECISION(8)) == 0 &&
             fputc('\n', f) != EOF && fflush(f) == 0 ? ERR_OK : ERR_IO;
    if (rc != ERR_OK)
        err_set(err, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    if (f != NULL && f != stdout && fclose(f) != 0 && rc == ERR_OK)
        rc = err_set(err, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    json_decref(all);
    return rc;
}
