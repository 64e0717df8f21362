/* cmd_train.c - `lorad train`: a whole run without a server, and `lorad train --check-data`. */
#include "server/cmd_train.h"

#include "engine/mem.h"
#include "engine/util.h"
#include "server/cmd.h"
#include "server/cmd_adapter.h"
#include "server/stop.h"
#include "server/train_args.h"
#include "store/jobs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct opt table[] = {
    { "base", 'b', "FILE", NULL, "base file made by lorad import", false },
    { "data", 'd', "FILE", NULL, "what to learn: JSON Lines (docs/training-data.md)", false },
    { "valid", 0, "FILE", NULL, "the same, only looked at", false },
    { "tokens", 0, "FILE:TENSOR", NULL, "instead of --data: ids [N, T] in a safetensors file", false },
    { "valid-tokens", 0, "FILE:TENSOR", NULL, "instead of --valid", false },
    { "check-data", 0, "FILE", NULL, "only say which lines of FILE are bad, and stop", false },
    { "skip-bad-lines", 0, NULL, NULL, "leave bad lines out instead of refusing the file", false },
    { "learn-prompts", 0, NULL, NULL, "learn prompts of text too", false },
    { "chat-template", 0, "FILE", NULL, "render messages with this template instead of the base's own",
      false },
    { "out", 'o', "DIR", NULL, "PEFT folder to write", false },
    { "db", 0, "FILE", NULL, "database to make a version in, with --name; and where --from is looked up",
      false },
    { "name", 'n', "NAME", NULL, "adapter that gets the version", false },
    { "tenant", 0, "NAME", "default", "whose adapter, with --db", false },
    { "no-activate", 0, NULL, NULL, "do not make the version live", false },
    { "from", 0, "DIR|NAME", NULL, "go on from an adapter: its ranks, alphas and modules", false },
    { "resume", 0, NULL, NULL, "go on with a run that was stopped", false },
    { "state", 0, "FILE", NULL, "where a stopped run is kept [DIR.state]", false },
    { "keep", 0, "SIZE", NULL, "memory for values that need not be computed again [half of what is left]",
      false },
    { "estimate", 0, NULL, NULL, "only say what the run will take, and stop", false },
    { "json", 0, NULL, NULL, "one JSON object per step on standard output", false },
    TRAIN_OPTIONS,
    SESSION_COMPUTE("exact"),
    { NULL, 0, NULL, NULL, NULL, false },
};

struct run {
    const struct opts *o;
    struct session s;
    struct chat_template *chat;
    struct train_opts t;
    struct train_set *data, *valid;
    uint8_t data_hash[32];
    struct adapter_src *from;
    int64_t from_id;
    struct train *train;
    struct train_files files;
    struct train_show show;
    size_t keep;               /* --keep */
    int64_t now;               /* the data's clock */
    char *state;               /* of the run that goes on, until it is restored */
    size_t state_at, state_len;
    int *ranks;                /* as they were written last; AdaLoRA */
    size_t nranks;
    struct train_valid last_valid;
    double last_loss;
    bool looked;
};

/* --- data ------------------------------------------------------------------------------------------- */
static void print_bad(const char *path, const struct dataset_report *rep)
{
    for (size_t i = 0; i < rep->nbad; i++)
        fprintf(stderr, "%s:%llu: %s\n", path, (unsigned long long)rep->bad[i].line,
                rep->bad[i].why);
    if (rep->bad_lines > rep->nbad)
        fprintf(stderr, "%s: %llu more bad lines\n", path,
                (unsigned long long)(rep->bad_lines - rep->nbad));
}

static bool reading(void *ud, uint64_t done, uint64_t total)
{
    progress(ud, done, total);
    return stop_asked();
}

static int read_file(struct run *r, const char *path, struct train_set **ret, struct err *err)
{
    const struct dataset_model m = { r->s.base, r->s.tokenizer, r->chat };
    const struct dataset_opts o = {
        .max_length = r->t.max_length, .learn_prompts = opt_flag(r->o, "learn-prompts"),
        .skip_bad = opt_flag(r->o, "skip-bad-lines"), .now = r->now,
    };
    struct dataset_report rep = { 0 };
    int rc = dataset_read(&m, path, &o, reading, (void *)path, &rep, ret, err);
    print_bad(path, &rep);
    if (rc == ERR_OK)
        fprintf(stderr, "%s: %llu examples, %llu tokens, %llu of them learned", path,
                (unsigned long long)rep.examples, (unsigned long long)rep.tokens,
                (unsigned long long)rep.targets);
    if (rc == ERR_OK && rep.cut > 0)
        fprintf(stderr, ", %llu cut", (unsigned long long)rep.cut);
    if (rc == ERR_OK)
        fputc('\n', stderr);
    dataset_report_free(&rep);
    return rc;
}

static int hash_file(const char *path, uint8_t ret[32], struct err *err)
{
    struct sha256 h;
    char piece[65536];
    size_t n;
    FILE *f = fopen(path, "rbe");
    if (f == NULL)
        return err_set(err, ERR_IO, "%s cannot be read", path);
    sha256_init(&h);
    while ((n = fread(piece, 1, sizeof piece, f)) > 0)
        sha256_add(&h, piece, n);
    const bool bad = ferror(f) != 0;
    fclose(f);
    sha256_end(&h, ret);
    return bad ? err_set(err, ERR_IO, "%s cannot be read", path) : ERR_OK;
}

/* --data or --tokens, and --valid or --valid-tokens. */
static int read_set(struct run *r, const char *text, const char *tokens, bool hash,
                    struct train_set **ret, struct err *err)
{
    const char *path = opt_str(r->o, text), *spec = opt_str(r->o, tokens);
    char *file = NULL;
    int rc = ERR_OK;
    if (path != NULL)
        rc = session_tokenizer(&r->s, err);
    if (rc == ERR_OK && path != NULL && r->chat == NULL)
        rc = session_template(r->s.base, opt_str(r->o, "chat-template"), &r->chat, err);
    if (rc == ERR_OK && path != NULL)
        rc = read_file(r, path, ret, err);
    else if (rc == ERR_OK && spec != NULL)
        rc = train_args_tokens(r->s.base, spec, r->t.max_length, &file, ret, err);
    if (rc == ERR_OK && hash)
        rc = hash_file(path != NULL ? path : file, r->data_hash, err);
    free(file);
    return rc;
}

static int check_data(const struct opts *o, const char *path)
{
    struct run r = { .o = o };
    struct dataset_report rep = { 0 };
    struct err err = { 0 };
    const bool model = opt_str(o, "base") != NULL;
    int code = model ? session_open_base(o, &r.s) : 0;
    if (code != 0)
        return code;
    int rc = model ? session_tokenizer(&r.s, &err) : ERR_OK;
    if (rc == ERR_OK && model)
        rc = session_template(r.s.base, opt_str(o, "chat-template"), &r.chat, &err);
    const struct dataset_model m = { r.s.base, r.s.tokenizer, r.chat };
    if (rc == ERR_OK)
        rc = dataset_read(model ? &m : NULL, path, NULL, reading, (void *)path, &rep, NULL, &err);
    print_bad(path, &rep);
    if (rc == ERR_OK && model)
        printf("%s: %llu lines, %llu examples, %llu tokens, %llu learned, longest %d\n", path,
               (unsigned long long)rep.lines, (unsigned long long)rep.examples,
               (unsigned long long)rep.tokens, (unsigned long long)rep.targets, rep.longest);
    else if (rc == ERR_OK)
        printf("%s: %llu lines, nothing wrong\n", path, (unsigned long long)rep.lines);
    dataset_report_free(&rep);
    chat_template_free(r.chat);
    session_close(&r.s);
    return rc == ERR_OK ? output_done() : fail(1, "%s", err.msg);
}

/* --- what the run starts from ------------------------------------------------------------------------ */
static int open_from(struct run *r, struct err *err)
{
    const char *ref = opt_str(r->o, "from");
    struct adapter_arg a;
    int rc = adapter_arg_open(r->o, ref, &r->s.base->arch, &a, err);
    if (rc != ERR_OK)
        return rc;
    if (a.base_hash[0] != '\0' && strcmp(a.base_hash, r->s.base->hash_hex) != 0)
        rc = err_set(err, ERR_CONFLICT, "%s was made for another base: %.12s..., not %.12s...",
                     a.label, a.base_hash, r->s.base->hash_hex);
    r->from = a.src;
    a.src = NULL;
    adapter_arg_close(&a);
    return rc;
}

/* --- estimate ------------------------------------------------------------------------------------------ */
static int measure(struct run *r, struct train_estimate *ret, struct err *err)
{
    return train_estimate(r->s.base, &r->s.compute, &r->t, r->data, r->valid, r->from, ret, err);
}

static void print_estimate(const struct run *r, const struct train_estimate *e)
{
    char need[32], base[32], step[32], all[32];
    fprintf(stderr,
            "%lld steps, %llu trainable numbers; memory %s beside the base's %s; about %s a step, "
            "%s in all\n", (long long)e->steps, (unsigned long long)e->trainable,
            human_bytes(train_args_bytes(e), need), human_bytes(r->s.base->bytes, base),
            train_args_time(e->seconds_per_step, step), train_args_time(e->seconds, all));
    if (opt_flag(r->o, "json") && opt_flag(r->o, "estimate"))
        printf("{\"steps\": %lld, \"trainable\": %llu, \"bytes\": %zu, \"base_bytes\": %zu, "
               "\"seconds_per_step\": %.6g, \"seconds\": %.6g}\n", (long long)e->steps,
               (unsigned long long)e->trainable, train_args_bytes(e), r->s.base->bytes,
               e->seconds_per_step, e->seconds);
}

/* Says what the run will take, refuses what cannot fit, and gives it half of what is left then for values
 * that need not be computed again. */
static int estimate(struct run *r, struct err *err)
{
    struct train_estimate e;
    char why[128], limit[32], taken[32];
    const size_t all = mem_limit(), resident = mem_resident();
    const size_t left = all > resident ? all - resident : 0;
    int rc = measure(r, &e, err);
    if (rc != ERR_OK)
        return rc;
    snprintf(why, sizeof why, "of %s of memory, this process has taken %s", human_bytes(all, limit),
             human_bytes(resident, taken));
    r->t.keep_bytes = opt_str(r->o, "keep") != NULL ? r->keep : train_args_keep(&e, left);
    if (r->t.keep_bytes > 0)
        rc = measure(r, &e, err);
    if (rc == ERR_OK)
        print_estimate(r, &e);
    return rc == ERR_OK ? train_args_fits(&e, left, why, err) : rc;
}

/* --- hooks ----------------------------------------------------------------------------------------------- */
static enum train_event wanted(void *ud)
{
    (void)ud;
    return stop_asked() ? TRAIN_PAUSE : TRAIN_GO_ON;
}

/* AdaLoRA: {"model.layers.0.self_attn.q_proj": 12, ...} where it is not as in the line before. */
static int add_ranks(struct run *r, json_t *line, struct err *err)
{
    char path[256];
    size_t n;
    const struct train_rank *k = train_ranks(r->train, &n);
    json_t *ranks = json_object();
    if (r->ranks == NULL && (r->ranks = malloc((n + 1) * sizeof *r->ranks)) != NULL)
        for (r->nranks = 0; r->nranks < n; r->nranks++)
            r->ranks[r->nranks] = -1;
    if (r->ranks == NULL || ranks == NULL) {
        json_decref(ranks);
        return err_nomem(err);
    }
    for (size_t i = 0; i < n && i < r->nranks; i++) {
        if (k[i].rank == r->ranks[i])
            continue;
        r->ranks[i] = k[i].rank;
        adapter_module_path(&r->s.base->arch, k[i].layer, k[i].module, path, sizeof path);
        json_object_set_new(ranks, path, json_integer(k[i].rank));
    }
    if (json_object_size(ranks) > 0)
        json_object_set(line, "ranks", ranks);
    json_decref(ranks);
    return ERR_OK;
}

static int step(void *ud, struct train *t, const struct train_report *rep,
                const struct train_valid *v, struct err *err)
{
    struct run *r = ud;
    json_t *line = train_args_step_json(rep, v);
    (void)t;
    if (line == NULL)
        return err_nomem(err);
    int rc = rep->budget >= 0 ? add_ranks(r, line, err) : ERR_OK;
    if (rc == ERR_OK)
        rc = train_files_metric(&r->files, line, err);
    if (rc == ERR_OK)
        train_show_step(&r->show, rep, v, line);
    json_decref(line);
    r->last_loss = rep->loss;
    if (v != NULL) {
        r->last_valid = *v;
        r->looked = true;
    }
    return rc;
}

static int checkpoint(void *ud, struct train *t, const struct train_report *rep,
                      const struct train_valid *v, struct err *err)
{
    const struct run *r = ud;
    (void)rep;
    (void)v;
    return train_files_save(&r->files, t, r->now, err);
}

/* --- the end --------------------------------------------------------------------------------------------- */
static int put_version(struct run *r, const struct adapter_src *a, struct err *err)
{
    struct store *st = NULL;
    struct store_version v = { 0 }, parent = { 0 };
    int64_t tenant;
    bool is_new;
    const struct store_quality q = {
        .train_loss = r->last_loss, .eval_loss = r->looked ? r->last_valid.loss : NAN,
        .eval_loss_base = NAN, .eval_tokens = r->looked ? (int64_t)r->last_valid.targets : -1,
    };
    int rc = store_open(opt_str(r->o, "db"), &st, err);
    if (rc == ERR_OK)
        rc = store_tenant_find(st, opt_str(r->o, "tenant"), &tenant, err);
    if (rc == ERR_OK && r->from != NULL && !adapter_arg_is_dir(r->o, opt_str(r->o, "from")))
        rc = store_version_find(st, tenant, opt_str(r->o, "from"), &parent, err);
    const struct store_put_opts po = {
        .activate = !opt_flag(r->o, "no-activate"), .base_hash_hex = r->s.base->hash_hex,
        .origin = "train", .parent = parent.id, .data_hash = r->data_hash, .quality = &q,
    };
    if (rc == ERR_OK)
        rc = store_adapter_put(st, tenant, opt_str(r->o, "name"), a, &po, &v, &is_new, err);
    if (rc == ERR_OK)
        fprintf(stderr, "%s@%d%s%s\n", v.name, v.version, v.live ? ", live" : "",
                is_new ? "" : ": it has this content already");
    store_version_free(&v);
    store_version_free(&parent);
    store_close(st);
    return rc;
}

static int finish(struct run *r, enum train_end end, struct err *err)
{
    struct adapter_src *a = NULL;
    char peak[32], time[32];
    if (end == TRAIN_PAUSED && !file_exists(r->files.state)) /* in the first look */
        return err_set(err, ERR_CANCELLED, "stopped before there was a state to go on from");
    if (end == TRAIN_PAUSED)
        return err_set(err, ERR_CANCELLED, "stopped in step %lld of %lld; the same command with "
                       "--resume goes on from %s", (long long)r->show.step + 1,
                       (long long)train_steps(r->train), r->files.state);
    if (end == TRAIN_EARLY)
        fprintf(stderr, "stopped early after step %lld: the validation loss does not fall any more\n",
                (long long)train_step_now(r->train));
    int rc = train_export(r->train, &a, err);
    if (rc == ERR_OK && opt_str(r->o, "name") != NULL)
        rc = put_version(r, a, err);
    if (rc == ERR_OK)
        rc = train_files_finish(&r->files, a, err);
    if (rc == ERR_OK) {
        train_files_forget(&r->files);
        if (r->files.out != NULL)
            fprintf(stderr, "written to %s\n", r->files.out);
        fprintf(stderr, "%s, peak memory %s\n",
                train_args_time(now_mono() - r->show.began, time),
                human_bytes(train_show_peak(), peak));
    }
    adapter_src_free(a);
    return rc;
}

/* --- the run ----------------------------------------------------------------------------------------------- */
static int open_state(struct run *r, struct err *err)
{
    r->now = (int64_t)time(NULL);
    if (opt_flag(r->o, "resume"))
        return train_files_state(&r->files, &r->state, &r->state_at, &r->state_len, &r->now, err);
    if (file_exists(r->files.state) && !opt_flag(r->o, "estimate"))
        return err_set(err, ERR_CONFLICT, "%s is the state of a run that was stopped: go on with "
                       "--resume, or remove it", r->files.state);
    return ERR_OK;
}

static int prepare(struct run *r, struct err *err)
{
    int rc = train_files_open(&r->files, opt_str(r->o, "out"), opt_str(r->o, "state"),
                              opt_str(r->o, "name"), err);
    if (rc == ERR_OK && opt_str(r->o, "name") != NULL)
        rc = store_name_check("an adapter", opt_str(r->o, "name"), err);
    if (rc == ERR_OK)
        rc = open_state(r, err);
    if (rc == ERR_OK)
        rc = read_set(r, "data", "tokens", true, &r->data, err);
    if (rc == ERR_OK)
        rc = read_set(r, "valid", "valid-tokens", false, &r->valid, err);
    if (rc == ERR_OK && opt_str(r->o, "from") != NULL)
        rc = open_from(r, err);
    return rc == ERR_OK ? estimate(r, err) : rc;
}

static int train(struct run *r, struct err *err)
{
    const struct train_hooks hooks = { r, wanted, step, checkpoint };
    enum train_end end = TRAIN_DONE;
    int rc = prepare(r, err);
    if (rc != ERR_OK || opt_flag(r->o, "estimate"))
        return rc;
    rc = train_create(r->s.base, &r->s.compute, &r->t, r->data, r->valid, r->from, &r->train, err);
    if (rc == ERR_OK && r->state != NULL)
        rc = train_restore(r->train, r->state + r->state_at, r->state_len, err);
    free(r->state);
    r->state = NULL;
    const char *was = rc == ERR_OK ? train_elsewhere(r->train) : NULL;
    if (was != NULL)
        fprintf(stderr, "the run was computed with \"%s\" and goes on with other arithmetic: the result "
                "will differ in its last digits from an uninterrupted run's\n", was);
    if (rc == ERR_OK)
        rc = train_files_begin(&r->files, train_step_now(r->train), err);
    if (rc != ERR_OK)
        return rc;
    train_show_init(&r->show, r->o, train_step_now(r->train), train_steps(r->train));
    rc = train_loop(r->train, &hooks, &end, err);
    train_show_end(&r->show);
    return rc == ERR_OK ? finish(r, end, err) : rc;
}

static void run_free(struct run *r)
{
    train_destroy(r->train);
    train_set_free(r->data);
    train_set_free(r->valid);
    adapter_src_free(r->from);
    chat_template_free(r->chat);
    train_opts_free(&r->t);
    train_files_close(&r->files);
    session_close(&r->s);
    free(r->state);
    free(r->ranks);
}

/* Options that contradict each other; 0, or 2 after a sentence. */
static int check_options(const struct opts *o)
{
    if ((opt_str(o, "data") != NULL) + (opt_str(o, "tokens") != NULL) != 1)
        return fail(2, "give one of --data FILE and --tokens FILE:TENSOR");
    if (opt_str(o, "valid") != NULL && opt_str(o, "valid-tokens") != NULL)
        return fail(2, "give one of --valid and --valid-tokens, not both");
    if (opt_str(o, "name") != NULL && opt_str(o, "db") == NULL)
        return fail(2, "--name needs the database: --db FILE");
    if (opt_str(o, "out") == NULL && opt_str(o, "name") == NULL && !opt_flag(o, "estimate"))
        return fail(2, "say where the adapter goes: --out DIR, or --db FILE --name NAME");
    return 0;
}

static int run_command(const struct opts *o)
{
    struct run r = { .o = o };
    struct err err = { 0 };
    int64_t keep = 0;
    int code = check_options(o);
    if (code == 0)
        code = opt_bytes(o, "keep", &keep) ? train_args_read(o, &r.t) : 2;
    r.keep = (size_t)keep;
    if (code == 0)
        code = session_open_base(o, &r.s);
    stop_catch();
    if (code == 0 && train(&r, &err) != ERR_OK)
        code = fail(1, "%s", err.msg);
    run_free(&r);
    return code == 0 ? output_done() : code;
}

int cmd_train(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(
        argc, argv, table, "train --base FILE --data FILE --out DIR [options]",
        "Trains an adapter on the frozen base and writes it as a PEFT folder, or as a version of a\n"
        "database, or both.  Ctrl-C keeps the state of the run; the same command with --resume goes on\n"
        "and gives the same bytes as a run that was not stopped.", 0, 0, &code);
    if (o == NULL)
        return code;
    code = opt_str(o, "check-data") != NULL ? check_data(o, opt_str(o, "check-data"))
                                            : run_command(o);
    opts_free(o);
    return code;
}
