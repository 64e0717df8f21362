/* cmd_adapter_diff.c - `lorad adapter diff`: how far two adapters are apart, module by module. */
#include "server/cmd_adapter.h"

#include "api/delta_json.h"

#include <math.h>
#include <string.h>

static void print_row(struct table *t, const char *name, const struct delta_row *r)
{
    table_cell(t, "%s", name);
    table_cell(t, r->rank[0] == r->rank[1] ? "%d" : "%d, %d", r->rank[0], r->rank[1]);
    table_cell(t, "%.6g", r->norm[0]);
    table_cell(t, "%.6g", r->norm[1]);
    table_cell(t, "%.6g", r->diff);
    table_cell(t, isnan(r->cosine) ? "-" : "%.6f", r->cosine);
    table_end_row(t);
}

static int print_text(const struct delta *d)
{
    struct table t;
    table_init(&t, "MODULE\tRANK\tNORM 1\tNORM 2\tNORM OF DIFFERENCE\tCOSINE");
    for (size_t i = 0; i < d->n; i++)
        print_row(&t, d->rows[i].path, &d->rows[i]);
    print_row(&t, "all", &d->all);
    return table_print(&t);
}

static int print_json(const struct delta *d, const struct adapter_arg *a,
                      const struct adapter_arg *b)
{
    json_t *j = delta_json(d);
    if (j != NULL)
        json_object_set_new(j, "adapters", json_pack("[s,s]", a->label, b->label));
    return json_print(j);
}

static int diff(const struct opts *o)
{
    struct adapter_arg a = { 0 }, b = { 0 };
    struct delta d = { 0 };
    struct err err = { 0 };
    int rc = adapter_arg_open(o, opts_arg(o, 0), NULL, &a, &err);
    if (rc == ERR_OK)
        rc = adapter_arg_open(o, opts_arg(o, 1), NULL, &b, &err);
    if (rc == ERR_OK)
        rc = delta_compare(a.src, b.src, &d, &err);
    int code = rc != ERR_OK          ? db_fail(&err)
               : opt_flag(o, "json") ? print_json(&d, &a, &b)
                                     : print_text(&d);
    delta_free(&d);
    adapter_arg_close(&a);
    adapter_arg_close(&b);
    return code;
}

int adapter_diff(int argc, char **argv)
{
    static const struct opt options[] = { ADAPTER_ARG_OPTIONS, OPT_JSON, { .name = NULL } };
    int code;
    struct opts *o = opts_parse(
        argc, argv, options, "adapter diff A B [--db FILE] [--base FILE]",
        "Compares the changes scaling * B A (AdaLoRA: B diag(E) A) that two adapters make to each\n"
        "weight matrix: their Frobenius norms, the norm of their difference, and the cosine between\n"
        "them.  A and B are NAME[@VERSION] with --db, or folders with --base.  A module that one\n"
        "of them has not got counts as a change of rank 0.",
        2, 2, &code);
    if (o == NULL)
        return code;
    code = diff(o);
    opts_free(o);
    return code;
}
