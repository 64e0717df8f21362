/* cmd_eval.c - `lorad eval`: loss on what a data file has to be learned, with and without adapters. */
#include "server/cmd.h"
#include "server/cmd_db.h"
#include "server/session.h"
#include "server/stop.h"
#include "server/train_args.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct opt table[] = {
    SESSION_OPTIONS("exact"),
    { "data", 'd', "FILE", NULL, "JSON Lines (docs/training-data.md): what would be learned counts",
      false },
    { "tokens", 0, "FILE:TENSOR", NULL, "instead of --data: ids [N, T] in a safetensors file", false },
    { "chat-template", 0, "FILE", NULL, "render messages with this template instead of the base's own",
      false },
    { "max-length", 0, "N", "0", "longer examples are cut (0: the model's positions)", false },
    { NULL, 0, NULL, NULL, NULL, false },
};

struct score {
    const struct train_example *e;
    int V;
    double nll;
    uint64_t targets, hits;
};

static void add(struct score *s, const float *logits, int id)
{
    int top = 0;
    for (int i = 1; i < s->V; i++)
        top = logits[i] > logits[top] ? i : top;
    s->nll += session_nll(logits, s->V, id);
    s->hits += top == id;
    s->targets++;
}

static int add_scores(void *ud, int pos, int n, const float *logits, struct err *err)
{
    struct score *s = ud;
    (void)err;
    for (int i = 0; i < n && pos + i + 1 < s->e->n; i++)
        if (s->e->learn[pos + i + 1])
            add(s, logits + (size_t)i * (size_t)s->V, s->e->tokens[pos + i + 1]);
    return ERR_OK;
}

static int read_set(struct session *s, const struct opts *o, int64_t max_length,
                    struct train_set **ret, struct err *err)
{
    const char *data = opt_str(o, "data");
    struct chat_template *chat = NULL;
    if (data == NULL)
        return train_args_tokens(s->base, opt_str(o, "tokens"), max_length, NULL, ret, err);
    int rc = session_tokenizer(s, err);
    if (rc == ERR_OK)
        rc = session_template(s->base, opt_str(o, "chat-template"), &chat, err);
    const struct dataset_model m = { s->base, s->tokenizer, chat };
    const struct dataset_opts d = { .max_length = (int)max_length };
    if (rc == ERR_OK)
        rc = dataset_read(&m, data, &d, NULL, NULL, NULL, ret, err);
    chat_template_free(chat);
    return rc;
}

static int measure(struct session *s, const struct train_set *set, struct score *score,
                   struct err *err)
{
    struct session_runner *r = NULL;
    int longest = 0;
    for (size_t i = 0; i < set->n; i++)
        longest = set->examples[i].n > longest ? set->examples[i].n : longest;
    int rc = session_runner_open(s, longest, &r, err);
    score->V = s->base->arch.V;
    for (size_t i = 0; rc == ERR_OK && i < set->n; i++) {
        score->e = &set->examples[i];
        rc = session_run(r, score->e->tokens, score->e->n, add_scores, score, err);
        progress("examples", i + 1, set->n);
        if (rc == ERR_OK && stop_asked())
            rc = err_set(err, ERR_CANCELLED, "stopped after %zu of %zu examples", i + 1, set->n);
    }
    session_runner_close(r);
    return rc;
}

static int eval(struct session *s, const struct opts *o, int64_t max_length, struct err *err)
{
    struct train_set *set = NULL;
    struct score score = { 0 };
    int rc = read_set(s, o, max_length, &set, err);
    if (rc == ERR_OK)
        rc = measure(s, set, &score, err);
    if (rc == ERR_OK) {
        const double loss = score.nll / (double)score.targets;
        printf("{\"examples\": %zu, \"targets\": %llu, \"loss\": %.10g, \"perplexity\": %.10g, "
               "\"accuracy\": %.10g}\n", set->n, (unsigned long long)score.targets, loss, exp(loss),
               (double)score.hits / (double)score.targets);
    }
    train_set_free(set);
    return rc;
}

int cmd_eval(int argc, char **argv)
{
    struct session s = { 0 };
    struct err err = { 0 };
    int64_t max_length = 0;
    int code;
    struct opts *o = opts_parse(
        argc, argv, table, "eval --base FILE [--adapter DIR]... --data FILE",
        "Prints, as JSON, how well the base with these adapters predicts what a data file has to be\n"
        "learned: loss (mean negative log-likelihood per token), perplexity, and accuracy (the part of\n"
        "tokens that were the most probable).", 0, 0, &code);
    if (o == NULL)
        return code;
    if ((opt_str(o, "data") != NULL) + (opt_str(o, "tokens") != NULL) != 1)
        code = fail(2, "give one of --data FILE and --tokens FILE:TENSOR");
    else
        code = opt_int(o, "max-length", 0, 1 << 30, &max_length) ? session_open(o, &s) : 2;
    if (code == 0) {
        stop_catch();
        if (eval(&s, o, max_length, &err) != ERR_OK)
            code = fail(1, "%s", err.msg);
        session_close(&s);
    }
    opts_free(o);
    return code == 0 ? output_done() : code;
}
