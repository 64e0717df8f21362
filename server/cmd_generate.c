/* cmd_generate.c - `lorad generate`: continue a prompt, through the same scheduler as the server. */
#include "server/cmd.h"
#include "server/session.h"

#include "engine/sched.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum { PROMPT_MAX = 64 << 20, ROWS = 256 };

static const struct opt table[] = {
    SESSION_OPTIONS("exact"),
    { "prompt", 'p', "TEXT", NULL, "what to continue; - reads standard input", false },
    { "max-tokens", 'n', "N", "128", "at most so many new tokens", false },
    { "temperature", 'T', "X", "1", "0 always takes the likeliest token", false },
    { "top-k", 0, "N", "0", "only the N likeliest tokens (0: all)", false },
    { "top-p", 0, "P", "1", "only the likeliest tokens that make up this share", false },
    { "min-p", 0, "P", "0", "only tokens at least P times as likely as the likeliest", false },
    { "repetition-penalty", 0, "X", "1", "divides the logits of tokens seen (1: off)", false },
    { "presence-penalty", 0, "X", "0", "subtracted from logits of tokens in the output", false },
    { "frequency-penalty", 0, "X", "0", "the same, times how often", false },
    { "seed", 's', "N", NULL, "the same seed gives the same text (default: a new one)", false },
    { "stop", 0, "TEXT", NULL, "stop before this text; may be repeated", true },
    { "ignore-eos", 0, NULL, NULL, "go on after an end token", false },
    { "prompt-lookup", 0, "N", "0", "with temperature 0: guess up to N tokens per step from what repeats; "
      "the same output, sooner", false },
    { "ids", 0, NULL, NULL, "print token ids instead of text", false },
    { "stats", 0, NULL, NULL, "tokens and times on standard error", false },
    { NULL, 0, NULL, NULL, NULL, false },
};

/* --- the request --------------------------------------------------------------------------- */
static bool read_sampling(const struct opts *o, struct sample_params *p)
{
    int64_t k = 0, seed = 0;
    double temperature, top_p, min_p, repetition, presence, frequency;
    if (!opt_double(o, "temperature", 0, 2, &temperature) || !opt_int(o, "top-k", 0, 1 << 30, &k) ||
        !opt_double(o, "top-p", 0, 1, &top_p) || !opt_double(o, "min-p", 0, 1, &min_p) ||
        !opt_double(o, "repetition-penalty", 0, 100, &repetition) ||
        !opt_double(o, "presence-penalty", -2, 2, &presence) ||
        !opt_double(o, "frequency-penalty", -2, 2, &frequency))
        return false;
    sample_defaults(p);
    p->temperature = (float)temperature;
    p->top_k = (int)k;
    p->top_p = (float)top_p;
    p->min_p = (float)min_p;
    p->repetition_penalty = (float)repetition;
    p->presence_penalty = (float)presence;
    p->frequency_penalty = (float)frequency;
    if (opt_str(o, "seed") == NULL)
        return getrandom(&p->seed, sizeof p->seed, 0) == sizeof p->seed;
    if (!opt_int(o, "seed", 0, INT64_MAX, &seed))
        return false;
    p->seed = (uint64_t)seed;
    return true;
}

/* 0, or the exit code. */
static int read_request(const struct opts *o, struct gen_request *q, int *ret_lookup)
{
    int64_t n, lookup;
    if (opt_str(o, "prompt") == NULL)
        return fail(2, "--prompt TEXT is needed");
    if (!read_sampling(o, &q->sample) || !opt_int(o, "max-tokens", 1, 1 << 24, &n) ||
        !opt_int(o, "prompt-lookup", 0, SCHED_LOOKUP_MAX, &lookup))
        return 2;
    *ret_lookup = (int)lookup;
    if (opt_count(o, "stop") > GEN_STOP_MAX)
        return fail(2, "--stop: at most %d can be given", GEN_STOP_MAX);
    q->max_tokens = (int)n;
    q->nstop = (int)opt_count(o, "stop");
    for (int i = 0; i < q->nstop; i++)
        q->stop[i] = opt_nth(o, "stop", (size_t)i);
    q->ignore_eos = opt_flag(o, "ignore-eos");
    return 0;
}

static int read_prompt(const char *given, struct buf *ret, struct err *err)
{
    if (strcmp(given, "-") != 0)
        return buf_puts(ret, given) == ERR_OK ? ERR_OK
                                              : err_set(err, ERR_TOO_LARGE, "the prompt is too long");
    char part[65536];
    size_t n;
    while ((n = fread(part, 1, sizeof part, stdin)) > 0)
        if (buf_add(ret, part, n) != ERR_OK)
            return err_set(err, ERR_TOO_LARGE, "the prompt is longer than %d bytes", PROMPT_MAX);
    return ferror(stdin) ? err_set(err, ERR_IO, "standard input cannot be read") : ERR_OK;
}

/* --- the answer ---------------------------------------------------------------------------- */
static void print_stats(struct gen *g)
{
    struct gen_usage u;
    gen_usage(g, &u);
    const double decode = u.total - u.first_token;
    fprintf(stderr, "prompt: %d tokens, %.3f s to the first token; output: %d tokens",
            u.prompt_tokens, u.first_token, u.completion_tokens);
    if (u.completion_tokens > 1 && decode > 0)
        fprintf(stderr, ", %.1f tokens/s", (u.completion_tokens - 1) / decode);
    fprintf(stderr, "\n");
}

/* Print until it ends; false if standard output does not take it. */
static bool stream(struct gen *g, bool ids, enum gen_finish *ret)
{
    struct gen_token t[64];
    struct buf text;
    size_t from = 0, shown = 0;
    bool ok = true;
    buf_init(&text, 1 << 30);
    do {
        gen_wait(g, from);
        size_t n = gen_read(g, from, t, 64, shown, ids ? NULL : &text, ret);
        for (size_t i = 0; ids && i < n; i++)
            printf("%s%d", from + i > 0 ? " " : "", (int)t[i].token);
        if (text.len > 0)
            fwrite(text.data, 1, text.len, stdout);
        from += n;
        shown += text.len;
        text.len = 0;
        ok = fflush(stdout) == 0 && !ferror(stdout);
    } while (ok && *ret == GEN_RUNNING);
    buf_free(&text);
    return ok && printf("\n") > 0 && fflush(stdout) == 0;
}

static int run(struct sched *sched, const struct gen_request *q, bool ids, bool stats,
               struct err *err)
{
    struct gen *g;
    enum gen_finish finish;
    int rc = sched_submit(sched, q, &g, err);
    if (rc != ERR_OK)
        return rc;
    if (!stream(g, ids, &finish)) {
        rc = err_set(err, ERR_IO, "standard output cannot be written");
    } else if (finish == GEN_ERROR) {
        gen_error(g, err);
        rc = err->code;
    } else if (stats) {
        print_stats(g);
    }
    gen_release(g);
    return rc;
}

/* A scheduler just large enough for this prompt and its answer. */
static int generate(struct session *s, struct gen_request *q, int lookup, const struct opts *o,
                    struct err *err)
{
    struct buf prompt;
    struct tok_ids ids = { .ids = NULL };
    struct sched *sched = NULL;
    const struct arch *a = &s->base->arch;
    buf_init(&prompt, PROMPT_MAX);
    int rc = session_tokenizer(s, err);
    if (rc == ERR_OK)
        rc = read_prompt(opt_str(o, "prompt"), &prompt, err);
    if (rc == ERR_OK)
        rc = tokenizer_encode(s->tokenizer, prompt.data != NULL ? prompt.data : "", prompt.len,
                              true, false, 0, &ids, err);
    if (rc == ERR_OK) {
        size_t positions = ids.n + (size_t)q->max_tokens;
        if (positions > (size_t)a->max_positions)
            positions = (size_t)a->max_positions;
        const struct sched_opts so = {
            .base = s->base, .tokenizer = s->tokenizer, .compute = &s->compute, .max_seqs = 1,
            .step_tokens = ROWS, .max_context = (int)positions, .lookup = lookup,
            .kv_bytes = ((positions + KV_PAGE - 1) / KV_PAGE) * kv_page_bytes(a, s->kv_type),
            .kv_type = s->kv_type,
        };
        rc = sched_create(&so, &sched, err);
    }
    if (rc == ERR_OK) {
        q->prompt = ids.ids;
        q->nprompt = (int)ids.n;
        rc = run(sched, q, opt_flag(o, "ids"), opt_flag(o, "stats"), err);
    }
    sched_destroy(sched);
    free(ids.ids);
    buf_free(&prompt);
    return rc;
}

int cmd_generate(int argc, char **argv)
{
    struct gen_request q = { .tenant = 0 };
    struct session s;
    struct err err = { 0 };
    int code, lookup = 0;
    struct opts *o = opts_parse(
        argc, argv, table, "generate --base FILE [--adapter DIR]... --prompt TEXT",
        "Prints the continuation of a prompt as it is made.  The same options and the same seed\n"
        "give the same text, whatever the number of threads and the kernel.", 0, 0, &code);
    if (o == NULL)
        return code;
    code = read_request(o, &q, &lookup);
    if (code == 0)
        code = session_open(o, &s);
    if (code == 0) {
        q.nadapters = s.lora.n;
        for (int i = 0; i < s.lora.n; i++)
            q.adapters[i] = (struct gen_adapter){ .resident = s.lora.item[i].adapter,
                                                  .weight = s.lora.item[i].weight };
        if (generate(&s, &q, lookup, o, &err) != ERR_OK)
            code = fail(1, "%s", err.msg);
        session_close(&s);
    }
    opts_free(o);
    return code;
}
