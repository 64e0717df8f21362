/* cmd_inspect.c - `lorad logits` and `lorad perplexity`: the numerics, checkable from outside. */
#include "server/cmd.h"
#include "server/session.h"

#include "engine/safetensors.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_MAX = 256 << 20, TOKENS_MAX = 1 << 26 };

/* N sequences; sequence i is ids[start[i] .. start[i+1]). */
struct sequences {
    int32_t *ids;
    size_t *start;
    size_t n;
};

static void sequences_free(struct sequences *s)
{
    free(s->ids);
    free(s->start);
}

static size_t longest(const struct sequences *s)
{
    size_t max = 0;
    for (size_t i = 0; i < s->n; i++)
        if (s->start[i + 1] - s->start[i] > max)
            max = s->start[i + 1] - s->start[i];
    return max;
}

/* Cut ids (taken over) into sequences of at most `each`. */
static int cut(int32_t *ids, size_t total, size_t each, struct sequences *ret, struct err *err)
{
    const size_t n = (total + each - 1) / each;
    size_t *start = malloc((n + 1) * sizeof *start);
    if (start == NULL) {
        free(ids);
        return err_nomem(err);
    }
    for (size_t i = 0; i <= n; i++)
        start[i] = i * each < total ? i * each : total;
    *ret = (struct sequences){ ids, start, n };
    return ERR_OK;
}

/* --- reading ids -------------------------------------------------------------------------- */
static int parse_list(const char *s, struct sequences *ret, struct err *err)
{
    size_t n = 0, cap = 1;
    for (const char *p = s; *p != '\0'; p++)
        cap += *p == ',' || *p == ' ';
    int32_t *ids = malloc(cap * sizeof *ids);
    if (ids == NULL)
        return err_nomem(err);
    for (const char *p = s; *p != '\0';) {
        char *end;
        errno = 0;
        long v = strtol(p, &end, 10);
        if (end == p || errno != 0 || v < 0 || v > INT32_MAX) {
            free(ids);
            return err_set(err, ERR_INVALID, "--tokens: \"%s\" is not a list of ids", s);
        }
        ids[n++] = (int32_t)v;
        for (p = end; *p == ',' || *p == ' ';)
            p++;
    }
    if (n == 0) {
        free(ids);
        return err_set(err, ERR_INVALID, "--tokens: there are no ids");
    }
    return cut(ids, n, n, ret, err);
}

static int from_tensor(const struct st_tensor *t, const char *path, struct sequences *ret,
                       struct err *err)
{
    if ((t->dtype != DT_I64 && t->dtype != DT_I32) || t->ndim < 1 || t->ndim > 2)
        return err_set(err, ERR_INVALID, "%s: tensor %s is not I32 or I64 [T] or [N, T]", path,
                       t->name);
    const size_t total = st_count(t), each = (size_t)t->shape[t->ndim - 1];
    if (total == 0 || total > TOKENS_MAX)
        return err_set(err, ERR_INVALID, "%s: tensor %s has %zu ids, not 1 to %d", path, t->name,
                       total, TOKENS_MAX);
    int32_t *ids = malloc(total * sizeof *ids);
    if (ids == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < total; i++) {
        int64_t v = 0;
        int32_t small = 0;
        if (t->dtype == DT_I64)
            memcpy(&v, t->data + i * 8, 8);
        else
            memcpy(&small, t->data + i * 4, 4), v = small;
        ids[i] = v < 0 || v > INT32_MAX ? -1 : (int32_t)v; /* refused by check_ids() */
    }
    return cut(ids, total, each, ret, err);
}

/* "1,2,3" or "FILE:TENSOR". */
static int read_tokens(const char *spec, struct sequences *ret, struct err *err)
{
    if (strspn(spec, "0123456789, ") == strlen(spec))
        return parse_list(spec, ret, err);
    const char *colon = strrchr(spec, ':');
    if (colon == NULL)
        return err_set(err, ERR_INVALID, "--tokens: \"%s\" is neither ids nor FILE:TENSOR", spec);
    char *path = strndup(spec, (size_t)(colon - spec));
    if (path == NULL)
        return err_nomem(err);
    struct st_file *f = NULL;
    int rc = st_open(path, &f, err);
    if (rc == ERR_OK) {
        const struct st_tensor *t = st_find(f, colon + 1);
        rc = t == NULL ? err_set(err, ERR_NOT_FOUND, "%s has no tensor %s", path, colon + 1)
                       : from_tensor(t, path, ret, err);
    }
    st_close(f);
    free(path);
    return rc;
}

static int check_ids(const struct sequences *s, int V, struct err *err)
{
    if (s->n == 0)
        return err_set(err, ERR_INVALID, "there are no tokens");
    for (size_t i = 0; i < s->start[s->n]; i++)
        if (s->ids[i] < 0 || s->ids[i] >= V)
            return err_set(err, ERR_INVALID, "token %zu is not an id of 0 to %d", i, V - 1);
    return ERR_OK;
}

/* A file, or standard input for "-". */
static int read_text(const char *path, char **ret, size_t *ret_len, struct err *err)
{
    if (strcmp(path, "-") != 0)
        return file_read(path, TEXT_MAX, ret, ret_len, err);
    struct buf b;
    char piece[65536];
    size_t n;
    buf_init(&b, TEXT_MAX);
    while ((n = fread(piece, 1, sizeof piece, stdin)) > 0) {
        int rc = buf_add(&b, piece, n);
        if (rc != ERR_OK) {
            buf_free(&b);
            return err_set(err, rc, "standard input has more than %d bytes", TEXT_MAX);
        }
    }
    *ret_len = b.len;
    *ret = buf_take(&b);
    return ERR_OK;
}

static int encode(struct session *s, const char *text, size_t len, size_t context,
                  struct sequences *ret, struct err *err)
{
    struct tok_ids ids = { 0 };
    int rc = session_tokenizer(s, err);
    if (rc == ERR_OK)
        rc = tokenizer_encode(s->tokenizer, text, len, true, false, TOKENS_MAX, &ids, err);
    if (rc == ERR_OK && ids.n < 2)
        rc = err_set(err, ERR_INVALID, "the text has %zu tokens: two are the least to measure",
                     ids.n);
    if (rc != ERR_OK) {
        free(ids.ids);
        return rc;
    }
    return cut(ids.ids, ids.n, context, ret, err);
}

/* --- lorad logits --------------------------------------------------------------------------- */
struct logits_out {
    struct st_writer *w;
    int V;
};

static int write_logits(void *ud, int pos, int n, const float *logits, struct err *err)
{
    const struct logits_out *o = ud;
    (void)pos;
    return st_writer_data(o->w, logits, (size_t)n * (size_t)o->V * sizeof *logits, err);
}

static int run_logits(struct session *s, const struct opts *o, struct sequences *seq,
                      struct err *err)
{
    struct session_runner *r = NULL;
    struct logits_out out = { .V = s->base->arch.V };
    int rc = read_tokens(opt_str(o, "tokens"), seq, err);
    if (rc == ERR_OK)
        rc = check_ids(seq, out.V, err);
    if (rc != ERR_OK)
        return rc;
    if (seq->n != 1)
        return err_set(err, ERR_INVALID, "--tokens has %zu sequences: logits takes one", seq->n);
    const int n = (int)seq->start[1];
    const int64_t shape[2] = { n, out.V };
    rc = session_runner_open(s, n, &r, err);
    if (rc == ERR_OK)
        rc = st_writer_open(opt_str(o, "out"), false, &out.w, err);
    if (rc == ERR_OK)
        rc = st_writer_tensor(out.w, "logits", "F32", 2, shape,
                              (size_t)n * (size_t)out.V * sizeof(float), err);
    if (rc == ERR_OK)
        rc = st_writer_begin(out.w, err);
    if (rc == ERR_OK)
        rc = session_run(r, seq->ids, n, write_logits, &out, err);
    if (rc == ERR_OK)
        rc = st_writer_commit(out.w, err);
    else
        st_writer_abort(out.w);
    session_runner_close(r);
    return rc;
}

int cmd_logits(int argc, char **argv)
{
    static const struct opt table[] = {
        SESSION_OPTIONS("exact"),
        { "tokens", 0, "IDS|FILE:TENSOR", NULL, "1,2,3, or a tensor of ids in a safetensors file",
          false },
        { "out", 'o', "FILE", NULL, "safetensors file to write: `logits`, F32 [T, V]", false },
        { NULL, 0, NULL, NULL, NULL, false },
    };
    struct session s = { 0 };
    struct sequences seq = { 0 };
    struct err err = { 0 };
    int code;
    struct opts *o = opts_parse(argc, argv, table, "logits --base FILE --tokens IDS --out FILE",
                                "Writes the logits of every position of a sequence.", 0, 0, &code);
    if (o == NULL)
        return code;
    if (opt_str(o, "tokens") == NULL || opt_str(o, "out") == NULL) {
        opts_free(o);
        return fail(2, "--tokens and --out are needed");
    }
    code = session_open(o, &s);
    if (code == 0) {
        if (run_logits(&s, o, &seq, &err) != ERR_OK)
            code = fail(1, "%s", err.msg);
        sequences_free(&seq);
        session_close(&s);
    }
    opts_free(o);
    return code;
}

/* --- lorad perplexity ------------------------------------------------------------------------ */
struct score {
    const int32_t *ids;
    int n, V;
    double nll;
    uint64_t count;
};

static int add_score(void *ud, int pos, int n, const float *logits, struct err *err)
{
    struct score *s = ud;
    (void)err;
    for (int i = 0; i < n && pos + i + 1 < s->n; i++) {
        s->nll += session_nll(logits + (size_t)i * (size_t)s->V, s->V, s->ids[pos + i + 1]);
        s->count++;
    }
    return ERR_OK;
}

static int read_sequences(struct session *s, const struct opts *o, struct sequences *ret,
                          struct err *err)
{
    const char *text = opt_str(o, "text"), *tokens = opt_str(o, "tokens");
    const int max = s->base->arch.max_positions;
    int64_t context = max < 2048 ? max : 2048;
    if (tokens != NULL)
        return read_tokens(tokens, ret, err);
    if (opt_str(o, "context") != NULL && !opt_int(o, "context", 2, max, &context))
        return err_set(err, ERR_INVALID, "the model has %d positions", max);
    if (text != NULL)
        return encode(s, text, strlen(text), (size_t)context, ret, err);
    char *data = NULL;
    size_t len = 0;
    int rc = read_text(opts_arg(o, 0), &data, &len, err);
    if (rc == ERR_OK)
        rc = encode(s, data != NULL ? data : "", len, (size_t)context, ret, err);
    free(data);
    return rc;
}

static int run_perplexity(struct session *s, const struct opts *o, struct sequences *seq,
                          struct score *score, struct err *err)
{
    struct session_runner *r = NULL;
    int rc = read_sequences(s, o, seq, err);
    if (rc == ERR_OK)
        rc = check_ids(seq, s->base->arch.V, err);
    if (rc == ERR_OK && longest(seq) > (size_t)s->base->arch.max_positions)
        rc = err_set(err, ERR_INVALID, "%zu tokens are more than the model's %d positions",
                     longest(seq), s->base->arch.max_positions);
    if (rc == ERR_OK)
        rc = session_runner_open(s, (int)longest(seq), &r, err);
    score->V = s->base->arch.V;
    for (size_t i = 0; rc == ERR_OK && i < seq->n; i++) {
        score->ids = seq->ids + seq->start[i];
        score->n = (int)(seq->start[i + 1] - seq->start[i]);
        rc = session_run(r, score->ids, score->n, add_score, score, err);
        progress("perplexity", i + 1, seq->n);
    }
    session_runner_close(r);
    if (rc == ERR_OK && score->count == 0)
        rc = err_set(err, ERR_INVALID, "no token has another before it: nothing to measure");
    return rc;
}

int cmd_perplexity(int argc, char **argv)
{
    static const struct opt table[] = {
        SESSION_OPTIONS("exact"),
        { "tokens", 0, "IDS|FILE:TENSOR", NULL,
          "ids instead of text; a tensor [N, T] is N sequences", false },
        { "text", 0, "TEXT", NULL, "this text instead of a file", false },
        { "context", 0, "N", NULL,
          "a longer text is cut into pieces of N tokens (default: 2048, or what the model has)",
          false },
        { NULL, 0, NULL, NULL, NULL, false },
    };
    struct session s = { 0 };
    struct sequences seq = { 0 };
    struct score score = { 0 };
    struct err err = { 0 };
    int code;
    struct opts *o = opts_parse(
        argc, argv, table, "perplexity --base FILE [TEXTFILE|-]",
        "Prints how well the model predicts a text, as JSON: tokens (how many were predicted), nll\n"
        "(their summed negative log-likelihood) and ppl = exp(nll / tokens).  The first token of a\n"
        "sequence is context only.", 0, 1, &code);
    if (o == NULL)
        return code;
    if ((opt_str(o, "text") != NULL) + (opt_str(o, "tokens") != NULL) + opts_nargs(o) != 1) {
        opts_free(o);
        return fail(2, "give one of a file, --text and --tokens");
    }
    code = session_open(o, &s);
    if (code == 0) {
        if (run_perplexity(&s, o, &seq, &score, &err) != ERR_OK)
            code = fail(1, "%s", err.msg);
        else
            printf("{\"tokens\": %llu, \"nll\": %.10g, \"ppl\": %.10g}\n",
                   (unsigned long long)score.count, score.nll,
                   exp(score.nll / (double)score.count));
        sequences_free(&seq);
        session_close(&s);
    }
    opts_free(o);
    return code;
}
