/* cmd_adapter.c - `lorad adapter` and `lorad check`: adapters in the database file.
 *
 * Works on the file, beside a running server too: SQLite keeps them apart and the server notices
 * within a second. */
#include "server/cmd.h"
#include "server/cmd_adapter.h"
#include "server/hub.h"
#include "server/stop.h"

#include "engine/delta.h"
#include "engine/torch_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CONFIG_MAX = 16 << 20 };

static const struct opt db_options[] = { OPT_DB, OPT_TENANT, { .name = NULL } };
static const struct opt show_options[] = { OPT_DB, OPT_TENANT, OPT_JSON, { .name = NULL } };

/* --- a subcommand is options, a tenant, and a function -------------------------------------- */
struct job {
    const struct opts *o;
    struct store *st;
    int64_t tenant;
    struct err err;
};

static int job_fail(struct job *j) { return db_fail(&j->err); }

/* Opens, runs, closes; frees `o`.  Returns the exit code. */
static int job_run(struct opts *o, bool create, int (*run)(struct job *j))
{
    struct job j = { .o = o };
    int code = db_open(o, create, &j.st);
    if (code == 0) {
        if (store_tenant_find(j.st, opt_str(o, "tenant"), &j.tenant, &j.err) == ERR_OK)
            code = run(&j);
        else
            code = job_fail(&j);
        store_close(j.st);
    }
    opts_free(o);
    return code;
}

/* NAME or NAME@V; *ret_version 0 without V. */
static bool split_ref(const char *ref, char name[STORE_NAME_MAX + 1], int *ret_version)
{
    const char *at = strchr(ref, '@');
    const size_t len = at != NULL ? (size_t)(at - ref) : strlen(ref);
    *ret_version = 0;
    if (len > STORE_NAME_MAX)
        return false;
    memcpy(name, ref, len);
    name[len] = '\0';
    if (at == NULL)
        return true;
    char *end;
    errno = 0;
    long v = strtol(at + 1, &end, 10);
    *ret_version = (int)v;
    return at[1] >= '1' && at[1] <= '9' && *end == '\0' && errno == 0 && v <= INT_MAX;
}

/* --- printing ------------------------------------------------------------------------------ */
static const char *rank_text(const struct store_version *v, char ret[32])
{
    if (v->rank_min == v->rank_max)
        snprintf(ret, 32, "%d", v->rank_max);
    else
        snprintf(ret, 32, "%d-%d", v->rank_min, v->rank_max);
    return ret;
}

static json_t *version_json(const struct store_version *v)
{
    json_t *j = json_pack(
        "{s:s, s:s, s:i, s:b, s:s, s:i, s:i, s:f, s:I, s:I, s:I, s:s, s:s, s:b, s:s, s:I}", "name",
        v->name, "tenant", v->tenant_name, "version", v->version, "live", (int)v->live, "method",
        adapter_method_name(v->method), "rank_min", v->rank_min, "rank_max", v->rank_max, "alpha",
        v->alpha, "params", (json_int_t)v->params, "bytes", (json_int_t)v->bytes, "modules",
        (json_int_t)v->modules, "hash", v->hash_hex, "base_hash", v->base_hash_hex, "base_claimed",
        (int)v->base_claimed, "origin", v->origin, "created", (json_int_t)(v->created_ms / 1000));
    if (j != NULL)
        json_object_set_new(j, "base_name",
                            v->base_name != NULL ? json_string(v->base_name) : json_null());
    return j;
}

static int print_versions(const struct store_version *v, size_t n, bool json)
{
    char rank[32], size[32], when[32];
    if (json) {
        json_t *all = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(all, version_json(&v[i]));
        return json_print(all);
    }
    struct table t;
    table_init(&t, "ADAPTER\tVERSION\tMETHOD\tRANK\tMODULES\tSIZE\tBASE\tORIGIN\tCREATED");
    for (size_t i = 0; i < n; i++) {
        table_cell(&t, "%s", v[i].name);
        table_cell(&t, "%d%s", v[i].version, v[i].live ? " live" : "");
        table_cell(&t, "%s", adapter_method_name(v[i].method));
        table_cell(&t, "%s", rank_text(&v[i], rank));
        table_cell(&t, "%lld", (long long)v[i].modules);
        table_cell(&t, "%s", human_bytes((size_t)v[i].bytes, size));
        table_cell(&t, "%.8s%s", v[i].base_hash_hex, v[i].base_claimed ? " claimed" : "");
        table_cell(&t, "%s", v[i].origin);
        table_cell(&t, "%s", when_text(v[i].created_ms, when));
        table_end_row(&t);
    }
    return table_print(&t);
}

/* --- add ----------------------------------------------------------------------------------- */
/* From --config and --weights; the caller closes *ret_file after the adapter is freed. */
static int read_two_files(const struct arch *arch, const char *config, const char *weights,
                          struct adapter_src **ret, struct st_file **ret_file, struct err *err)
{
    char *text;
    size_t len;
    int rc = file_read(config, CONFIG_MAX, &text, &len, err);
    if (rc != ERR_OK)
        return rc;
    rc = weights_open(weights, ret_file, err);
    if (rc == ERR_OK)
        rc = peft_parse(arch, text, len, *ret_file, ret, err);
    free(text);
    return rc;
}

static int print_added(const struct store_version *v, bool is_new, bool json)
{
    char rank[32], size[32];
    if (json) {
        json_t *j = version_json(v);
        if (j != NULL)
            json_object_set_new(j, "new", json_boolean(is_new));
        return json_print(j);
    }
    printf("%s@%d%s: %s, rank %s, %lld modules, %s%s\n", v->name, v->version,
           is_new ? "" : " has this content already", adapter_method_name(v->method),
           rank_text(v, rank), (long long)v->modules, human_bytes((size_t)v->bytes, size),
           v->live ? ", live" : "");
    return output_done();
}

/* A folder, a GGUF file, or hub:ORG/NAME[@REVISION]. */
static int load_dir_or_hub(const struct opts *o, const struct arch *arch, const char *from,
                           struct adapter_src **ret, struct err *err)
{
    static const char scheme[] = "hub:";
    struct hub_ref ref;
    struct hub_opts hub;
    char *dir = NULL;
    if (strncmp(from, scheme, sizeof scheme - 1) != 0)
        return adapter_load(arch, from, ret, err);
    int rc = hub_ref_parse(from + sizeof scheme - 1, &ref, err);
    if (rc == ERR_OK && !hub_opts_read(o, &hub))
        rc = err_set(err, ERR_INVALID, "nothing was downloaded");
    stop_catch();
    if (rc == ERR_OK)
        rc = hub_fetch(&hub, &ref, HUB_ADAPTER, &dir, err);
    if (rc == ERR_OK)
        rc = peft_load_dir(arch, dir, ret, err);
    free(dir);
    return rc;
}

static int add(struct job *j)
{
    const struct opts *o = j->o;
    const char *config = opt_str(o, "config-file"), *weights = opt_str(o, "weights");
    struct adapter_src *src = NULL;
    struct st_file *file = NULL;
    struct arch arch;
    char base_hash[65];
    int rc = adapter_read_base(opt_str(o, "base"), &arch, base_hash, &j->err);
    if (rc == ERR_OK && opts_nargs(o) == 2)
        rc = load_dir_or_hub(o, &arch, opts_arg(o, 1), &src, &j->err);
    else if (rc == ERR_OK)
        rc = read_two_files(&arch, config, weights, &src, &file, &j->err);

    struct store_version v;
    bool is_new;
    const struct store_put_opts put = { .activate = !opt_flag(o, "no-activate"),
                                        .base_hash_hex = base_hash, .base_claimed = true,
                                        .origin = "upload" };
    if (rc == ERR_OK)
        rc = store_adapter_put(j->st, j->tenant, opts_arg(o, 0), src, &put, &v, &is_new, &j->err);
    adapter_src_free(src);
    st_close(file);
    if (rc != ERR_OK)
        return job_fail(j);
    int code = print_added(&v, is_new, opt_flag(o, "json"));
    store_version_free(&v);
    return code;
}

static int adapter_add(int argc, char **argv)
{
    static const struct opt options[] = {
        OPT_DB,
        { "base", 'b', "FILE", NULL, "base file that the adapter is for", false },
        { "config-file", 0, "FILE", NULL, "adapter_config.json, instead of DIR", false },
        { "weights", 0, "FILE", NULL, "adapter_model.safetensors or .bin, instead of DIR", false },
        OPT_TENANT,
        { "no-activate", 0, NULL, NULL, "do not make the new version live", false },
        HUB_OPTIONS,
        OPT_JSON,
        { .name = NULL },
    };
    int code;
    struct opts *o = opts_parse(argc, argv, options, "adapter add NAME DIR|FILE --base FILE --db FILE",
                                "Checks an adapter against the base and adds it as a new"
                                " version of NAME.  DIR holds PEFT's adapter_config.json and"
                                " adapter_model.safetensors or .bin,\nor is hub:ORG/NAME[@REVISION];"
                                " FILE is a LoRA in GGUF.", 1,
                                2, &code);
    if (o == NULL)
        return code;
    const bool config = opt_str(o, "config-file") != NULL, weights = opt_str(o, "weights") != NULL;
    if (opt_str(o, "base") == NULL)
        code = fail(2, "say which base the adapter is for: --base FILE");
    else if (opts_nargs(o) == 2 ? config || weights : !(config && weights))
        code = fail(2, "give the adapter's folder, or both --config-file and --weights");
    else
        return job_run(o, true, add);
    opts_free(o);
    return code;
}

/* --- list, versions, show ------------------------------------------------------------------ */
static int list(struct job *j)
{
    struct store_version *v;
    size_t n;
    if (store_adapter_list(j->st, j->tenant, NULL, 0, &v, &n, &j->err) != ERR_OK)
        return job_fail(j);
    int code = print_versions(v, n, opt_flag(j->o, "json"));
    store_versions_free(v, n);
    return code;
}

static int adapter_list(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, show_options, "adapter list --db FILE",
                                "One line for each adapter: its live version, or its newest one.",
                                0, 0, &code);
    return o == NULL ? code : job_run(o, false, list);
}

static int versions(struct job *j)
{
    struct store_version *v;
    size_t n;
    if (store_version_list(j->st, j->tenant, opts_arg(j->o, 0), &v, &n, &j->err) != ERR_OK)
        return job_fail(j);
    int code = print_versions(v, n, opt_flag(j->o, "json"));
    store_versions_free(v, n);
    return code;
}

static int adapter_versions(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, show_options, "adapter versions NAME --db FILE", NULL,
                                1, 1, &code);
    return o == NULL ? code : job_run(o, false, versions);
}

/* `norm` of the module's change, or NULL. */
static json_t *module_json(const struct adapter_src_module *m, const double *norm)
{
    json_t *j = json_pack("{s:s, s:i, s:i, s:i, s:f, s:f, s:i, s:i}", "path", m->path, "layer",
                          m->layer, "rank", m->rank, "init_rank", m->init_rank, "alpha", m->alpha,
                          "scaling", m->scaling, "in", m->in, "out", m->out);
    if (j != NULL)
        json_object_set_new(j, "norm", norm != NULL ? json_real(*norm) : json_null());
    if (j != NULL && m->mask != NULL) {
        json_t *mask = json_array();
        for (int i = 0; i < m->init_rank; i++)
            json_array_append_new(mask, json_boolean(m->mask[i]));
        json_object_set_new(j, "kept", mask);
    }
    if (m->importance != NULL && j != NULL) { /* of all initial triplets */
        json_t *list = json_array();
        for (int i = 0; i < m->init_rank; i++)
            json_array_append_new(list, isfinite(m->importance[i])
                                            ? json_real((double)m->importance[i])
                                            : json_null());
        json_object_set_new(j, "importance", list);
    }
    return j;
}

static json_t *extra_json(const struct adapter_src_extra *x)
{
    json_t *j = json_pack("{s:s, s:s, s:i}", "name", x->name, "kind", adapter_extra_name(x->kind),
                          "rows", x->rows);
    if (j != NULL && x->cols > 0)
        json_object_set_new(j, "cols", json_integer(x->cols));
    return j;
}

static json_t *show_json(const struct store_version *v, const struct adapter_src *a,
                         const double *norm)
{
    json_t *j = version_json(v), *all = json_array(), *extras = json_array();
    for (size_t i = 0; i < a->nmodules; i++)
        json_array_append_new(all, module_json(&a->modules[i], norm ? &norm[i] : NULL));
    for (size_t i = 0; i < a->nextras; i++)
        json_array_append_new(extras, extra_json(&a->extras[i]));
    if (j == NULL) {
        json_decref(all);
        json_decref(extras);
        return NULL;
    }
    json_object_set_new(j, "module_list", all);
    json_object_set_new(j, "extra_tensors", extras);
    json_object_set_new(j, "config", json_loads(a->config, 0, NULL));
    if (a->method == METHOD_ADALORA)
        json_object_set_new(j, "schedule",
                            json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:f}", "init_r",
                                      a->init_r, "target_r", a->target_r, "tinit", a->tinit,
                                      "tfinal", a->tfinal, "deltaT", a->deltaT, "total_step",
                                      a->total_step, "beta1", a->beta1, "beta2", a->beta2,
                                      "orth_reg_weight", a->orth_reg_weight));
    return j;
}

/* Tensors beside the factors. */
static int show_extras(const struct adapter_src *a)
{
    struct table t;
    printf("\n");
    table_init(&t, "TENSOR\tKIND\tSHAPE");
    for (size_t i = 0; i < a->nextras; i++) {
        const struct adapter_src_extra *x = &a->extras[i];
        table_cell(&t, "%s", x->name);
        table_cell(&t, "%s", adapter_extra_name(x->kind));
        table_cell(&t, x->cols > 0 ? "%d x %d" : "%d", x->rows, x->cols);
        table_end_row(&t);
    }
    return table_print(&t);
}

static int show_text(const struct store_version *v, const struct adapter_src *a,
                     const double *norm)
{
    char rank[32], size[32], when[32];
    struct table t;
    printf("%s/%s@%d%s\n", v->tenant_name, v->name, v->version, v->live ? ", live" : "");
    printf("method   %s, rank %s, alpha %g\n", adapter_method_name(v->method), rank_text(v, rank),
           v->alpha);
    if (a->method == METHOD_ADALORA) {
        int before = 0, after = 0;
        for (size_t i = 0; i < a->nmodules; i++) {
            before += a->modules[i].init_rank;
            after += a->modules[i].rank;
        }
        printf("pruning  %d of %d triplets kept; init_r %d, target_r %d, steps %d+%d of %d\n", after,
               before, a->init_r, a->target_r, a->tinit, a->tfinal, a->total_step);
    }
    printf("size     %s, %llu parameters, %lld modules\n", human_bytes((size_t)v->bytes, size),
           (unsigned long long)v->params, (long long)v->modules);
    printf("hash     %s\nbase     %s%s\n", v->hash_hex, v->base_hash_hex,
           v->base_claimed ? " (claimed by the upload)" : "");
    printf("origin   %s, %s UTC\n\n", v->origin, when_text(v->created_ms, when));
    adapter_chart(a, norm);
    table_init(&t, "MODULE\tRANK\tALPHA\tSCALING\tNORM\tOUT x IN\tKEPT");
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        char kept[ADAPTER_MAX_RANK + 1] = "";
        for (int k = 0; m->mask != NULL && k < m->init_rank; k++) {
            kept[k] = m->mask[k] ? '+' : '.';
            kept[k + 1] = '\0';
        }
        table_cell(&t, "%s", m->path);
        table_cell(&t, m->rank == m->init_rank ? "%d" : "%d of %d", m->rank, m->init_rank);
        table_cell(&t, "%g", m->alpha);
        table_cell(&t, "%g", m->scaling);
        if (norm != NULL)
            table_cell(&t, "%.4g", norm[i]);
        else
            table_cell(&t, "%s", "");
        table_cell(&t, "%d x %d", m->out, m->in);
        table_cell(&t, "%s", kept);
        table_end_row(&t);
    }
    const int code = table_print(&t);
    return code != 0 || a->nextras == 0 ? code : show_extras(a);
}

/* Norms of what is a plain change of weights; of other adapters the rest is shown. */
static int show_version(struct job *j, const struct store_version *v)
{
    struct adapter_src *a = NULL;
    double *norm = NULL;
    int rc = store_version_load(j->st, v->id, &a, &j->err);
    if (rc == ERR_OK && delta_check(a, NULL) == ERR_OK) {
        norm = calloc(a->nmodules + 1, sizeof *norm);
        rc = norm != NULL ? delta_norms(a, norm, &j->err) : err_nomem(&j->err);
    }
    int code = rc != ERR_OK             ? job_fail(j)
               : opt_flag(j->o, "json") ? json_print(show_json(v, a, norm))
                                        : show_text(v, a, norm);
    adapter_src_free(a);
    free(norm);
    return code;
}

static int show(struct job *j)
{
    struct store_version v;
    if (store_version_find(j->st, j->tenant, opts_arg(j->o, 0), &v, &j->err) != ERR_OK)
        return job_fail(j);
    int code = show_version(j, &v);
    store_version_free(&v);
    return code;
}

static int adapter_show(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, show_options, "adapter show NAME[@VERSION] --db FILE",
                                "The facts of a version (the live one without @VERSION) and of each"
                                " of its modules:\nrank, scaling, and the Frobenius norm of the"
                                " change that it makes to the weights.", 1, 1, &code);
    return o == NULL ? code : job_run(o, false, show);
}

/* --- get ----------------------------------------------------------------------------------- */
static int write_config(const struct adapter_src *a, const char *path, struct err *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0)
        return err_set(err, errno == EEXIST ? ERR_CONFLICT : ERR_IO, "%s: %s", path,
                       strerror(errno));
    int rc = fd_write_all(fd, a->config, a->config_len, err);
    if (close(fd) != 0 && rc == ERR_OK)
        rc = err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    if (rc != ERR_OK)
        unlink(path);
    return rc;
}

int adapter_write_folder(const struct adapter_src *a, const char *dir, struct err *err)
{
    if (mkdir(dir, 0777) != 0 && errno != EEXIST)
        return err_set(err, ERR_IO, "cannot make the folder %s: %s", dir, strerror(errno));
    char *config = path_join(dir, "adapter_config.json");
    char *weights = path_join(dir, "adapter_model.safetensors");
    int rc;
    if (config == NULL || weights == NULL) {
        rc = err_nomem(err);
    } else if (file_exists(weights)) {
        rc = err_set(err, ERR_CONFLICT, "%s is there already", weights);
    } else if ((rc = write_config(a, config, err)) == ERR_OK) {
        rc = peft_write_weights(a, weights, err);
        if (rc != ERR_OK)
            unlink(config);
    }
    free(config);
    free(weights);
    return rc;
}

static int get(struct job *j)
{
    struct store_version v;
    struct adapter_src *a = NULL;
    const char *dir = opt_str(j->o, "out");
    int rc = store_version_find(j->st, j->tenant, opts_arg(j->o, 0), &v, &j->err);
    if (rc != ERR_OK)
        return job_fail(j);
    rc = store_version_load(j->st, v.id, &a, &j->err);
    if (rc == ERR_OK)
        rc = adapter_write_folder(a, dir, &j->err);
    if (rc == ERR_OK)
        printf("%s@%d written to %s\n", v.name, v.version, dir);
    adapter_src_free(a);
    store_version_free(&v);
    return rc == ERR_OK ? output_done() : job_fail(j);
}

static int adapter_get(int argc, char **argv)
{
    static const struct opt options[] = {
        OPT_DB,
        OPT_TENANT,
        { "out", 'o', "DIR", NULL, "folder to write, made if it is not there", false },
        { .name = NULL },
    };
    int code;
    struct opts *o = opts_parse(argc, argv, options, "adapter get NAME[@VERSION] -o DIR --db FILE",
                                "Writes a version as PEFT's two files, with the config as it was"
                                " uploaded and the same bytes in every tensor.", 1, 1, &code);
    if (o == NULL)
        return code;
    if (opt_str(o, "out") != NULL)
        return job_run(o, false, get);
    opts_free(o);
    return fail(2, "say where to: -o DIR");
}

/* --- promote, rm --------------------------------------------------------------------------- */
static int promote(struct job *j)
{
    char name[STORE_NAME_MAX + 1];
    int version;
    const char *ref = opts_arg(j->o, 0);
    if (!split_ref(ref, name, &version) || version == 0)
        return fail(2, "\"%s\" is not NAME@VERSION", ref);
    if (store_adapter_promote(j->st, j->tenant, name, version, &j->err) != ERR_OK)
        return job_fail(j);
    printf("%s@%d is live\n", name, version);
    return output_done();
}

static int adapter_promote(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, db_options, "adapter promote NAME@VERSION --db FILE",
                                "Makes a version answer to the bare name.  Requests that run keep"
                                " the version they began with.", 1, 1, &code);
    return o == NULL ? code : job_run(o, false, promote);
}

static int rm(struct job *j)
{
    char name[STORE_NAME_MAX + 1];
    int version;
    const char *ref = opts_arg(j->o, 0);
    if (!split_ref(ref, name, &version))
        return fail(2, "\"%s\" is neither NAME nor NAME@VERSION", ref);
    int rc = version == 0 ? store_adapter_delete(j->st, j->tenant, name, &j->err)
                          : store_version_delete(j->st, j->tenant, name, version, &j->err);
    if (rc != ERR_OK)
        return job_fail(j);
    printf("%s removed\n", ref);
    return output_done();
}

static int adapter_rm(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, db_options, "adapter rm NAME[@VERSION] --db FILE",
                                "Removes an adapter with all its versions, or one version that is"
                                " not live.  Version numbers are never used again.", 1, 1, &code);
    return o == NULL ? code : job_run(o, false, rm);
}

int cmd_adapter(int argc, char **argv)
{
    static const struct subcmd table[] = {
        { "add", "NAME DIR|FILE|hub:ORG/NAME --base FILE", "add an adapter as a new version",
          adapter_add },
        { "list", "", "list adapters", adapter_list },
        { "show", "NAME[@VERSION]", "facts of a version and its modules", adapter_show },
        { "diff", "A B", "how far two adapters are apart, per module", adapter_diff },
        { "versions", "NAME", "list the versions of an adapter", adapter_versions },
        { "get", "NAME[@VERSION] -o DIR", "write a version as a PEFT folder",
          adapter_get },
        { "export", "NAME[@VERSION] -o PATH", "write it as plain LoRA or for llama.cpp",
          adapter_export },
        { "merge", "NAME --into HF_DIR -o DIR", "add it to the weights of a folder",
          adapter_merge_cmd },
        { "promote", "NAME@VERSION", "make a version live", adapter_promote },
        { "rm", "NAME[@VERSION]", "remove an adapter or a version", adapter_rm },
        { .name = NULL },
    };
    return subcmd_run("adapter", table, argc, argv);
}

/* --- check --------------------------------------------------------------------------------- */
static int check_in(struct store *st, const char *path)
{
    struct err err = { .code = ERR_OK };
    int64_t n;
    if (store_check(st, &err) != ERR_OK || store_adapter_count(st, 0, &n, &err) != ERR_OK)
        return db_fail(&err);
    printf("%s: nothing wrong (%lld adapter%s)\n", path, (long long)n, n == 1 ? "" : "s");
    return output_done();
}

int cmd_check(int argc, char **argv)
{
    static const struct opt options[] = { OPT_DB, { .name = NULL } };
    int code;
    struct store *st;
    struct opts *o = opts_parse(argc, argv, options, "check --db FILE",
                                "Reads the whole database: its structure, its references, and the"
                                " hash of every version's tensors.", 0, 0, &code);
    if (o == NULL)
        return code;
    code = db_open(o, false, &st);
    if (code == 0) {
        code = check_in(st, opt_str(o, "db"));
        store_close(st);
    }
    opts_free(o);
    return code;
}
