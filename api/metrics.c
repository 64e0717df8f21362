/* metrics.c - GET /metrics: counters for Prometheus (text format 0.0.4).
 *
 * One table.  Where vLLM has a name for the same thing, that name is used too, so that dashboards
 * and inference gateways made for it work.  With keys, only tenant `default`, the operator's, may
 * read this: sums over all tenants are nobody else's business. */
#include "api/api_int.h"

#include "engine/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct facts {
    struct sched_stats s;
    struct adapter_cache_stats a;
};

enum { METRICS_MAX_BYTES = 1 << 16 };

static int one(struct buf *b, const char *name, const char *type, const char *help, double value)
{
    return buf_printf(b, "# HELP %s %s\n# TYPE %s %s\n%s %.17g\n", name, help, name, type, name, value);
}

/* And the longest of all, which no bucket tells. */
static int spread(struct buf *b, const char *name, const char *help, const struct histogram_stats *h)
{
    uint64_t n = 0;
    int rc = buf_printf(b, "# HELP %s %s\n# TYPE %s histogram\n", name, help, name);
    for (int i = 0; i < HISTOGRAM_BOUNDS && rc == ERR_OK; i++)
        rc = buf_printf(b, "%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, histogram_bounds[i],
                        n += h->bucket[i]);
    n += h->bucket[HISTOGRAM_BOUNDS];
    if (rc == ERR_OK)
        rc = buf_printf(b, "%s_bucket{le=\"+Inf\"} %" PRIu64 "\n%s_sum %.17g\n%s_count %" PRIu64 "\n",
                        name, n, name, h->sum, name, n);
    char longest[96];
    snprintf(longest, sizeof longest, "%s_max", name);
    return rc != ERR_OK ? rc : one(b, longest, "gauge", "The longest of these.", h->max);
}

static int write_metrics(struct buf *b, const struct api *api, const struct facts *f)
{
    const struct sched_stats *s = &f->s;
    const struct adapter_cache_stats *a = &f->a;
    const char *const gauge = "gauge", *const counter = "counter";
    const double kv_all = s->kv.pages > 0 ? s->kv.pages : 1;
    const struct {
        const char *name, *type, *help;
        double value;
    } rows[] = {
        { "vllm:num_requests_running", gauge, "Sequences that run.", s->running },
        { "vllm:num_requests_waiting", gauge, "Sequences that wait.", s->waiting },
        { "vllm:kv_cache_usage_perc", gauge, "Share of KV pages held by sequences, 0 to 1.",
          s->kv.used / kv_all },
        { "vllm:prompt_tokens_total", counter, "Prompt tokens computed.", (double)s->prompt_tokens },
        { "vllm:generation_tokens_total", counter, "Tokens generated.", (double)s->generated_tokens },
        { "vllm:spec_decode_num_draft_tokens_total", counter, "Tokens that prompt lookup guessed.",
          (double)s->guessed },
        { "vllm:spec_decode_num_accepted_tokens_total", counter, "Of those, what was chosen.",
          (double)s->guessed_right },
        { "vllm:prefix_cache_queries_total", counter, "Look-ups of shared prefixes.",
          (double)s->kv.lookups },
        { "lorad_prefix_cache_hit_tokens_total", counter, "Prompt tokens found in shared pages.",
          (double)s->kv.hit_tokens },
        { "lorad_kv_pages", gauge, "KV pages of 16 positions.", s->kv.pages },
        { "lorad_kv_pages_cached", gauge, "Free pages that can still be found.", s->kv.cached },
        { "lorad_kv_evictions_total", counter, "Shared pages given up for new ones.",
          (double)s->kv.evicted },
        { "lorad_steps_total", counter, "Forward passes.", (double)s->steps },
        { "lorad_decode_step_seconds_max", gauge, "Longest pass while a sequence waited for its next token.",
          s->decode_step_max },
        { "lorad_rows_total", counter, "Token rows of all passes.", (double)s->rows },
        { "lorad_finished_total", counter, "Sequences that ended.", (double)s->finished },
        { "lorad_cancelled_total", counter, "Sequences whose client went away.", (double)s->cancelled },
        { "lorad_preemptions_total", counter, "Sequences put back for want of pages.",
          (double)s->preempted },
        { "lorad_rejected_total", counter, "Sequences refused because the queue was full.",
          (double)s->rejected },
        { "lorad_adapter_cache_budget_bytes", gauge, "Memory for adapters.", (double)a->budget },
        { "lorad_adapter_cache_bytes", gauge, "Adapters in memory.", (double)a->bytes },
        { "lorad_adapters_resident", gauge, "Adapters in memory.", a->resident },
        { "lorad_adapters_pinned", gauge, "Adapters in use.", a->pinned },
        { "lorad_adapter_hits_total", counter, "Requests whose adapter was there.", (double)a->hits },
        { "lorad_adapter_misses_total", counter, "Requests that waited for a load.", (double)a->misses },
        { "lorad_adapter_loads_total", counter, "Adapters read from the database.", (double)a->loads },
        { "lorad_adapter_evictions_total", counter, "Adapters that made room.", (double)a->evictions },
        { "lorad_adapter_failures_total", counter, "Loads that failed.", (double)a->failures },
        { "lorad_base_bytes", gauge, "The base in memory.", (double)api->o.base->bytes },
        { "process_resident_memory_bytes", gauge, "Resident memory.", (double)mem_resident() },
    };
    int rc = ERR_OK;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0] && rc == ERR_OK; i++)
        rc = one(b, rows[i].name, rows[i].type, rows[i].help, rows[i].value);
    const struct {
        const char *name, *help;
        const struct histogram_stats *h;
    } times[] = {
        { "vllm:inter_token_latency_seconds", "From a sequence's token to its next.", &s->gap },
        { "lorad_running_gap_seconds", "The same, of sequences that were not preempted between.",
          &s->running_gap },
        { "lorad_between_steps_seconds", "Between two passes, while sequences run.", &s->between },
        { "lorad_step_seconds", "Passes, until their tokens were chosen.", &s->step },
    };
    for (size_t i = 0; i < sizeof times / sizeof times[0] && rc == ERR_OK; i++)
        rc = spread(b, times[i].name, times[i].help, times[i].h);
    return rc;
}

int metrics(struct api_ctx *c, struct err *err)
{
    if (c->plan->tenant != STORE_TENANT_DEFAULT)
        return err_set_slug(err, ERR_FORBIDDEN, "operator_only", NULL,
                            "only a key of tenant default may read the metrics of all tenants");
    struct facts f;
    memset(&f, 0, sizeof f);
    sched_stats(c->api->o.sched, &f.s);
    adapter_cache_stats(c->api->o.adapters, &f.a);
    struct buf b;
    buf_init(&b, METRICS_MAX_BYTES);
    if (write_metrics(&b, c->api, &f) != ERR_OK) {
        buf_free(&b);
        return err_nomem(err);
    }
    c->resp->status = 200;
    c->resp->type = "text/plain; version=0.0.4; charset=utf-8";
    c->resp->body_len = b.len;
    c->resp->body = buf_take(&b);
    return ERR_OK;
}
