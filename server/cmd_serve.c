/* cmd_serve.c - lorad serve: puts the parts together, says what it made, waits for a signal, and
 * takes them apart in reverse order.
 *
 * Signals are blocked in all threads and waited for here.  The first SIGTERM or SIGINT drains: no
 * new generations, running ones get --drain-seconds.  A second one ends the process at once. */
#include "api/api.h"
#include "engine/mem.h"
#include "engine/util.h"
#include "server/adapter_loader.h"
#include "server/cmd.h"
#include "server/http.h"
#include "server/job_runner.h"
#include "server/options.h"
#include "server/session.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct opt table[] = {
    { "base", 'b', "FILE", NULL, "base file made by lorad import", false },
    { "db", 'd', "FILE", "lorad.db", "database of adapters, tenants and keys", false },
    { "host", 0, "ADDRESS", "127.0.0.1", "address to listen on; other than loopback needs a key "
      "(lorad key create)", false },
    { "port", 'p', "N", "8080", "0: any free one", false },
    { "threads", 't', "N", "0", "that compute; 0: one per available CPU", false },
    { "precision", 0, "fast|exact|f32", "fast", "how linear layers multiply", false },
    { "kernel", 0, "auto|scalar|avx2|avx512", "auto", "instruction set", false },
    { "memory", 'm', "SIZE", NULL, "for everything; default 80 % of what there is", false },
    { "kv", 0, "SIZE", NULL, "of that for the key/value cache; default three quarters of the rest",
      false },
    KV_TYPE_OPTION,
    { "adapter-cache", 0, "SIZE", NULL, "of that for adapters; default a quarter of the rest",
      false },
    { "chat-template", 0, "FILE", NULL, "render messages with this template instead of the base's own",
      false },
    { "mmap", 0, NULL, NULL, "map the base file instead of copying it to huge pages", false },
    { "max-seqs", 0, "N", "64", "sequences that run at once", false },
    { "step-tokens", 0, "N", "512", "token rows of one step", false },
    { "chunk-tokens", 0, "N", "64", "of these for prompts, while other sequences wait for their next token", false },
    { "prompt-lookup", 0, "N", "0", "while one greedy sequence runs alone: tokens that are guessed per step from "
      "what it repeats; same results, sooner; 0: off", false },
    { "max-queue", 0, "N", "256", "sequences that wait; more are answered 429 (400 if one request asks for more)", false },
    { "context", 0, "N", "0", "longest sequence; 0: what the model allows", false },
    { "max-upload", 0, "SIZE", "2G", "largest adapter", false },
    { "max-file", 0, "SIZE", "512M", "largest file of training data", false },
    { "jobs", 0, "on|off", "on", "run fine-tuning jobs, at idle priority", false },
    { "train-threads", 0, "N", "0", "that train; 0: one per available CPU", false },
    { "train-precision", 0, "fast|exact|f32", "exact", "how linear layers multiply in training", false },
    { "train-memory", 0, "SIZE", NULL, "set aside for a running job; default what --memory leaves",
      false },
    { "max-jobs", 0, "N", "100", "fine-tuning jobs of a tenant that have not ended; 0: no limit", false },
    { "max-uploads", 0, "N", "4", "uploads at once", false },
    { "max-body", 0, "SIZE", "8M", "largest JSON body", false },
    { "request-timeout", 0, "SECONDS", "600", "longest a generation may take; 0: for ever", false },
    { "drain-seconds", 0, "SECONDS", "30", "for running work after SIGTERM", false },
    { "max-connections", 0, "N", "1024", "open at once", false },
    { "max-per-address", 0, "N", "512", "open at once from one address; 0: no limit", false },
    { "workers", 0, "N", "4", "threads that run handlers", false },
    { "poll-threads", 0, "N", "2", "threads that read and write sockets", false },
    { "idle-timeout", 0, "SECONDS", "60", "before an unused connection is closed", false },
    { "header-timeout", 0, "SECONDS", "20", "for a request's headers to arrive", false },
    { "body-timeout", 0, "SECONDS", "30", "for a request's body, beyond what 16 KiB/s takes",
      false },
    { "stall-timeout", 0, "SECONDS", "30", "before a client that stopped reading is cut off",
      false },
    { "access-log", 0, NULL, NULL, "one line per request on stderr (never prompts or keys)",
      false },
    { NULL, 0, NULL, NULL, NULL, false },
};

/* Everything that runs, in the order it is made. */
struct server {
    const char *db_path;
    struct base *base;
    struct compute compute;
    struct tokenizer *tokenizer;
    struct chat_template *chat;
    struct adapter_loader loader;
    struct adapter_cache *adapters;
    struct sched *sched;
    struct job_runner *jobs;
    struct api *api;
    struct http *http;
    struct sched_opts so;
    struct api_opts ao;
    struct http_opts ho;
    struct job_runner_opts jo;
    char memory_why[160];
    bool run_jobs, kv_type_given;
    struct mem_plan plan;
    int port, fd;
    bool keys;
    double drain_seconds;
};

static bool int_opt(const struct opts *o, const char *name, int64_t lo, int64_t hi, int *ret)
{
    int64_t v;
    if (!opt_int(o, name, lo, hi, &v))
        return false;
    *ret = (int)v;
    return true;
}

static bool size_opt(const struct opts *o, const char *name, size_t *ret)
{
    int64_t v;
    if (!opt_bytes(o, name, &v))
        return false;
    *ret = (size_t)v;
    return true;
}

/* Numbers out of the table; false: a sentence was printed. */
static bool read_options(const struct opts *o, struct server *s, size_t *ret_memory, size_t *ret_kv,
                         size_t *ret_cache, int *ret_threads)
{
    struct http_opts *h = &s->ho;
    return int_opt(o, "threads", 0, 1024, ret_threads) && size_opt(o, "memory", ret_memory) &&
           size_opt(o, "kv", ret_kv) && size_opt(o, "adapter-cache", ret_cache) &&
           int_opt(o, "max-seqs", 1, 4096, &s->so.max_seqs) &&
           int_opt(o, "step-tokens", 1, 65536, &s->so.step_tokens) &&
           int_opt(o, "chunk-tokens", 1, 65536, &s->so.chunk_tokens) &&
           int_opt(o, "prompt-lookup", 0, SCHED_LOOKUP_MAX, &s->so.lookup) &&
           int_opt(o, "max-queue", 1, 1000000, &s->so.max_queue) &&
           int_opt(o, "context", 0, 1 << 24, &s->so.max_context) &&
           int_opt(o, "port", 0, 65535, &s->port) &&
           size_opt(o, "max-upload", &s->ao.max_adapter_bytes) &&
           size_opt(o, "max-file", &s->ao.max_file_bytes) &&
           int_opt(o, "max-jobs", 0, 1000000, &s->ao.max_jobs) &&
           size_opt(o, "max-body", &s->ao.max_json_bytes) &&
           opt_double(o, "request-timeout", 0, 1e6, &s->ao.request_seconds) &&
           opt_double(o, "drain-seconds", 0, 1e6, &s->drain_seconds) &&
           int_opt(o, "max-connections", 2, 100000, &h->max_connections) &&
           int_opt(o, "max-per-address", 0, 100000, &h->max_per_address) &&
           int_opt(o, "max-uploads", 1, 1000, &h->max_uploads) &&
           int_opt(o, "workers", 1, 64, &h->workers) &&
           int_opt(o, "poll-threads", 1, 64, &h->poll_threads) &&
           opt_double(o, "idle-timeout", 1, 1e6, &h->idle_seconds) &&
           opt_double(o, "header-timeout", 1, 1e6, &h->header_seconds) &&
           opt_double(o, "body-timeout", 1, 1e6, &h->body_seconds) &&
           opt_double(o, "stall-timeout", 1, 1e6, &h->stall_seconds);
}

/* What jobs may use.  Memory that is set aside for them is not serving's; without that they get what the
 * plan leaves, which is known when there is one.  0, or 2 after a sentence. */
static int read_job_options(const struct opts *o, struct server *s, size_t *memory)
{
    struct err err = { 0 };
    const char *on = opt_str(o, "jobs");
    const size_t limit = mem_limit();
    char a[32], b[32];
    s->run_jobs = strcmp(on, "on") == 0;
    if (!s->run_jobs && strcmp(on, "off") != 0)
        return fail(2, "--jobs is on or off, not %s", on);
    if (!int_opt(o, "train-threads", 0, 1024, &s->jo.threads) ||
        !size_opt(o, "train-memory", &s->jo.memory))
        return 2;
    if (precision_parse(opt_str(o, "train-precision"), &s->jo.precision, &err) != ERR_OK)
        return fail(2, "--train-precision: %s", err.msg);
    if (s->jo.precision == PREC_F32 && s->compute.precision != PREC_F32)
        return fail(2, "--train-precision f32 needs the base's scales in fp32: --precision f32 too");
    if (s->jo.memory >= limit)
        return fail(2, "--train-memory %s is all of the %s there are", human_bytes(s->jo.memory, a),
                    human_bytes(limit, b));
    if (s->jo.memory > 0 && *memory == 0)
        *memory = limit / 5 * 4 < limit - s->jo.memory ? limit / 5 * 4 : limit - s->jo.memory;
    return 0;
}

static void plan_jobs(struct server *s)
{
    const size_t limit = mem_limit();
    char a[32], b[32];
    if (s->jo.memory > 0) {
        snprintf(s->memory_why, sizeof s->memory_why, "that is --train-memory");
        return;
    }
    s->jo.memory = limit > s->plan.total ? limit - s->plan.total : 0;
    snprintf(s->memory_why, sizeof s->memory_why,
             "of %s of memory, serving may take %s (--memory); --train-memory sets some aside",
             human_bytes(limit, a), human_bytes(s->plan.total, b));
}

/* The database: made if it is not there; nothing left of uploads that a crash cut off. */
static int open_db(struct server *s, struct err *err)
{
    struct store *st;
    int64_t keys = 0;
    int rc = store_open(s->db_path, &st, err);
    if (rc == ERR_OK)
        rc = store_key_count(st, &keys, err);
    if (rc == ERR_OK)
        rc = spool_clean(s->db_path, err);
    store_close(st);
    s->keys = keys > 0;
    return rc;
}

static int load_base(struct server *s, const char *path, bool use_mmap, size_t memory, size_t kv,
                     size_t cache, struct err *err)
{
    size_t bytes;
    struct mem_plan first;
    int rc = base_size(path, &bytes, err);
    if (rc == ERR_OK) /* too big for the machine: say so before it is full */
        rc = mem_plan(memory, bytes, 0, 0, 0, 0, &first, err);
    if (rc == ERR_OK)
        rc = base_load(path, s->compute.precision, use_mmap, &s->base, err);
    if (rc == ERR_OK)
        rc = tokenizer_load(s->base->tokenizer_json, s->base->tokenizer_json_len, &s->tokenizer,
                            err);
    if (rc != ERR_OK)
        return rc;
    const struct arch *a = &s->base->arch;
    if (!s->kv_type_given)
        s->so.kv_type = kv_type_default(s->base->is_f32);
    s->so.base = s->base;
    s->so.tokenizer = s->tokenizer;
    s->so.compute = &s->compute;
    if (s->so.max_context > a->max_positions)
        return err_set(err, ERR_INVALID, "--context %d is more than the %d positions of %s",
                       s->so.max_context, a->max_positions, s->base->name);
    const int context = s->so.max_context ? s->so.max_context : a->max_positions;
    const size_t pages = ((size_t)context + KV_PAGE - 1) / KV_PAGE;
    return mem_plan(memory, s->base->bytes, sched_work_bytes(&s->so),
                    pages * kv_page_bytes(a, s->so.kv_type), kv, cache, &s->plan, err);
}

static int start_engine(struct server *s, struct err *err)
{
    s->loader = (struct adapter_loader){ .db_path = s->db_path, .base = s->base };
    int rc = adapter_cache_create(s->plan.adapters, adapter_loader_load, &s->loader, &s->adapters, err);
    s->so.adapters = s->adapters;
    s->so.kv_bytes = s->plan.kv;
    if (rc == ERR_OK)
        rc = sched_create(&s->so, &s->sched, err);
    return rc;
}

static int start_jobs(struct server *s, struct err *err)
{
    s->jo.db_path = s->db_path;
    s->jo.base = s->base;
    s->jo.tokenizer = s->tokenizer;
    s->jo.chat = s->chat;
    s->jo.isa = s->compute.isa;
    s->jo.memory_why = s->memory_why;
    int rc = job_runner_start(&s->jo, &s->jobs, err);
    s->ao.jobs_wake = rc == ERR_OK ? job_runner_wake : NULL;
    s->ao.jobs_ud = s->jobs;
    return rc;
}

static int start_api(struct server *s, const char *host, bool access_log, struct err *err)
{
    int rc = http_listen(host, s->port, &s->fd, &s->port, &s->ao.loopback, err);
    if (rc != ERR_OK)
        return rc;
    if (!s->keys && !s->ao.loopback)
        return err_set(err, ERR_INVALID, "--host %s can be reached from other machines, and %s has no "
                       "keys: make one first with `lorad key create --db %s`, or listen on 127.0.0.1",
                       host, s->db_path, s->db_path);
    s->ao.base = s->base;
    s->ao.tokenizer = s->tokenizer;
    s->ao.chat_template = s->chat;
    s->ao.sched = s->sched;
    s->ao.adapters = s->adapters;
    s->ao.compute = &s->compute;
    s->ao.db_path = s->db_path;
    s->ao.version = lorad_version;
    rc = s->run_jobs ? start_jobs(s, err) : ERR_OK;
    if (rc != ERR_OK)
        return rc;
    rc = api_create(&s->ao, &s->api, err);
    if (rc != ERR_OK)
        return rc;
    s->ho.api = s->api;
    s->ho.db_path = s->db_path;
    s->ho.access_log = access_log ? stderr : NULL;
    const int fd = s->fd;
    s->fd = -1; /* http_start() closes it, also when it fails */
    return http_start(&s->ho, fd, &s->http, err);
}

static void banner(const struct server *s, const char *host)
{
    char total[32], base[32], work[32], kv[32], token[32], adapters[32];
    const bool v6 = strchr(host, ':') != NULL;
    fprintf(stderr,
            "lorad %s\n"
            "  base       %s, %s (%.1f million parameters, %.2f bytes each), hash %.16s\n"
            "  memory     %s: base %s, work %s, KV %s (%s, %s a token), adapters %s\n"
            "  compute    %d thread%s, kernel %s, precision %s\n"
            "  database   %s, %s\n"
            "  listening  http://%s%s%s:%d/\n",
            lorad_version, s->base->name, human_bytes(s->base->bytes, base), (double)s->base->params / 1e6,
            (double)s->base->bytes / (double)s->base->params, s->base->hash_hex,
            human_bytes(s->plan.total, total), base, human_bytes(s->plan.work, work),
            human_bytes(s->plan.kv, kv), kv_type_name(s->so.kv_type),
            human_bytes(kv_page_bytes(&s->base->arch, s->so.kv_type) / KV_PAGE, token),
            human_bytes(s->plan.adapters, adapters),
            pool_threads(s->compute.pool), pool_threads(s->compute.pool) == 1 ? "" : "s", isa_name(s->compute.isa),
            precision_name(s->compute.precision), s->db_path,
            s->keys ? "every /v1 route needs a key" : "no keys: this machine only, tenant default",
            v6 ? "[" : "", host, v6 ? "]" : "", s->port);
}

static void stop(struct server *s)
{
    http_stop(s->http, 5);
    job_runner_stop(s->jobs);
    if (s->sched != NULL)
        sched_destroy(s->sched);
    if (s->adapters != NULL)
        adapter_cache_destroy(s->adapters);
    adapter_loader_close(&s->loader);
    api_destroy(s->api);
    chat_template_free(s->chat);
    tokenizer_free(s->tokenizer);
    base_free(s->base);
    pool_destroy(s->compute.pool);
}

/* Until SIGTERM or SIGINT; then let running work finish. */
static void wait_and_drain(struct server *s, const sigset_t *signals)
{
    int sig;
    while (sigwait(signals, &sig) != 0)
        continue;
    fprintf(stderr, "lorad: %s: finishing what runs, for at most %g s\n", strsignal(sig),
            s->drain_seconds);
    pthread_sigmask(SIG_UNBLOCK, signals, NULL); /* a second one kills */
    job_runner_ask_stop(s->jobs);
    api_set_draining(s->api);
    sched_drain(s->sched, s->drain_seconds);
}

static int serve(const struct opts *o, struct server *s, struct err *err)
{
    size_t memory, kv, cache;
    int threads;
    if (!read_options(o, s, &memory, &kv, &cache, &threads))
        return 2;
    if (opt_str(o, "base") == NULL)
        return fail(2, "--base FILE is needed; lorad import makes one");
    if (precision_parse(opt_str(o, "precision"), &s->compute.precision, err) != ERR_OK ||
        isa_select(opt_str(o, "kernel"), &s->compute.isa, err) != ERR_OK)
        return fail(2, "%s", err->msg);
    int code = session_kv_type(o, &s->so.kv_type, &s->kv_type_given);
    if (code == 0)
        code = read_job_options(o, s, &memory);
    if (code != 0)
        return code;

    /* Before any thread, so that all of them leave the signals to this one. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    s->db_path = opt_str(o, "db");
    const char *host = opt_str(o, "host");
    int rc = open_db(s, err);
    if (rc == ERR_OK)
        rc = pool_create(threads, &s->compute.pool, err);
    if (rc == ERR_OK)
        rc = load_base(s, opt_str(o, "base"), opt_flag(o, "mmap"), memory, kv, cache, err);
    if (rc == ERR_OK)
        plan_jobs(s);
    if (rc == ERR_OK)
        rc = session_template(s->base, opt_str(o, "chat-template"), &s->chat, err);
    if (rc == ERR_OK)
        rc = start_engine(s, err);
    if (rc == ERR_OK)
        rc = start_api(s, host, opt_flag(o, "access-log"), err);
    if (rc == ERR_OK) {
        banner(s, host);
        wait_and_drain(s, &signals);
    }
    stop(s);
    return rc == ERR_OK ? 0 : fail(1, "%s", err->msg);
}

int cmd_serve(int argc, char **argv)
{
    int code = 0;
    struct opts *o = opts_parse(argc, argv, table, "serve --base FILE [options]",
                                "Serve a base model and the adapters of a database over an "
                                "OpenAI-compatible HTTP API.", 0, 0, &code);
    if (o == NULL)
        return code;
    struct server *s = calloc(1, sizeof *s);
    struct err err = { 0 };
    code = s ? serve(o, s, &err) : fail(1, "out of memory");
    free(s);
    opts_free(o);
    return code;
}
