/* cmd_tokenize.c - `lorad tokenize`: text to ids and back.
 *
 * Only the header of the base file is read: the tokenizer lies in its metadata. */
#include "engine/safetensors.h"
#include "engine/tokenizer.h"
#include "engine/util.h"
#include "server/cmd.h"
#include "server/options.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_INPUT = 256 << 20, MAX_FILE = 512 << 20 };

static const struct opt options[] = {
    { "base", 'b', "FILE", NULL, "base file made by lorad import", false },
    { "tokenizer", 0, "FILE", NULL, "a tokenizer.json instead of a base", false },
    { "ids", 0, NULL, NULL, "print the list of ids only", false },
    { "no-special", 0, NULL, NULL,
      "do not add <s> and the like; with --decode, leave special tokens out", false },
    { "decode", 0, NULL, NULL, "the argument is a list of ids; print the text", false },
    { 0 },
};

static const char about[] =
    "Prints JSON: {\"count\": N, \"ids\": [...], \"tokens\": [...]}, or only the list with --ids.\n"
    "Without TEXT, or with -, reads standard input to its end, line breaks included.  --decode\n"
    "takes what either form prints, or ids between spaces or commas, and prints the text alone.";

static int load(const struct opts *o, struct tokenizer **ret, struct err *err)
{
    const char *path = opt_str(o, "tokenizer");
    if (path != NULL) {
        char *json;
        size_t len;
        int rc = file_read(path, MAX_FILE, &json, &len, err);
        if (rc != ERR_OK)
            return rc;
        rc = tokenizer_load(json, len, ret, err);
        free(json);
        return rc;
    }
    struct st_file *f;
    path = opt_str(o, "base");
    int rc = st_open(path, &f, err);
    if (rc != ERR_OK)
        return rc;
    const char *json = st_meta(f, "lorad.tokenizer");
    rc = json == NULL ? err_set(err, ERR_INVALID,
                                "%s: there is no tokenizer in it; is it a base file?", path)
                      : tokenizer_load(json, strlen(json), ret, err);
    st_close(f);
    return rc;
}

static int read_stdin(struct buf *b, struct err *err)
{
    char piece[1 << 16];
    size_t n;
    int rc = ERR_OK;
    while (rc == ERR_OK && (n = fread(piece, 1, sizeof piece, stdin)) > 0)
        rc = buf_add(b, piece, n);
    if (rc == ERR_NOMEM)
        return err_nomem(err);
    if (rc != ERR_OK)
        return err_set(err, rc, "standard input is longer than %d bytes", MAX_INPUT);
    return ferror(stdin) ? err_set(err, ERR_IO, "standard input cannot be read") : ERR_OK;
}

/* --- to ids --------------------------------------------------------------------------------- */
/* What a token stands for; U+FFFD if that is a part of a character. */
static json_t *piece_json(const struct tokenizer *t, int id)
{
    struct buf b;
    buf_init(&b, 1 << 24);
    json_t *v = NULL;
    if (tokenizer_piece(t, id, &b) == ERR_OK) {
        v = json_stringn(b.data != NULL ? b.data : "", b.len);
        if (v == NULL)
            v = json_string("\xEF\xBF\xBD");
    }
    buf_free(&b);
    return v;
}

static int print_ids(const struct tokenizer *t, const struct tok_ids *ids, bool only_ids,
                     struct err *err)
{
    json_t *list = json_array(), *tokens = json_array(), *all = NULL;
    int rc = ERR_OK;
    for (size_t i = 0; i < ids->n && rc == ERR_OK; i++) {
        if (json_array_append_new(list, json_integer(ids->ids[i])) != 0 ||
            (!only_ids && json_array_append_new(tokens, piece_json(t, ids->ids[i])) != 0))
            rc = err_nomem(err);
    }
    if (rc == ERR_OK) {
        all = only_ids ? json_incref(list)
                       : json_pack("{s:I, s:O, s:O}", "count", (json_int_t)ids->n, "ids", list,
                                   "tokens", tokens);
        if (all == NULL || json_dumpf(all, stdout, JSON_COMPACT) != 0 || putchar('\n') == EOF)
            rc = err_set(err, ERR_IO, "the result cannot be written");
    }
    json_decref(list);
    json_decref(tokens);
    json_decref(all);
    return rc;
}

static int encode(const struct opts *o, const struct tokenizer *t, const char *text, size_t len,
                  struct err *err)
{
    struct tok_ids ids = { 0 };
    int rc = tokenizer_encode(t, text, len, !opt_flag(o, "no-special"), true, 0, &ids, err);
    if (rc == ERR_OK)
        rc = print_ids(t, &ids, opt_flag(o, "ids"), err);
    free(ids.ids);
    return rc;
}

/* --- to text ---------------------------------------------------------------------------------- */
static int parse_list(const char *s, size_t len, struct tok_ids *ret, struct err *err)
{
    ret->ids = malloc((len / 2 + 1) * sizeof *ret->ids);
    if (ret->ids == NULL)
        return err_nomem(err);
    const char *p = s;
    for (;;) {
        p += strspn(p, " ,\t\r\n[]");
        if (*p == '\0')
            break;
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 0 || v > INT32_MAX || strchr(" ,\t\r\n]", *end) == NULL)
            return err_set(err, ERR_INVALID, "\"%.40s\" is not a list of ids", p);
        ret->ids[ret->n++] = (int32_t)v;
        p = end;
    }
    if (p != s + len)
        return err_set(err, ERR_INVALID, "a NUL byte is not a list of ids");
    return ERR_OK;
}

/* {"ids": [...]}, as this command prints it. */
static int parse_object(const char *s, size_t len, struct tok_ids *ret, struct err *err)
{
    json_error_t why;
    json_t *o = json_loadb(s, len, JSON_ALLOW_NUL, &why);
    const json_t *ids = json_object_get(o, "ids");
    int rc = ERR_OK;
    if (!json_is_array(ids))
        rc = err_set(err, ERR_INVALID, "the ids are neither a list nor an object with \"ids\"");
    ret->ids = malloc((json_array_size(ids) + 1) * sizeof *ret->ids);
    if (ret->ids == NULL) {
        json_decref(o);
        return err_nomem(err);
    }
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(ids); i++) {
        const json_t *v = json_array_get(ids, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            rc = err_set(err, ERR_INVALID, "entry %zu of \"ids\" is not an id", i);
        else
            ret->ids[ret->n++] = (int32_t)json_integer_value(v);
    }
    json_decref(o);
    return rc;
}

static int decode(const struct opts *o, const struct tokenizer *t, const char *text, size_t len,
                  struct err *err)
{
    struct tok_ids ids = { 0 };
    struct buf out;
    buf_init(&out, MAX_FILE);
    size_t blank = strspn(text, " \t\r\n");
    int rc =
        text[blank] == '{' ? parse_object(text, len, &ids, err) : parse_list(text, len, &ids, err);
    if (rc == ERR_OK)
        rc = tokenizer_decode(t, ids.ids, ids.n, opt_flag(o, "no-special"), &out, err);
    if (rc == ERR_OK && fwrite(out.data != NULL ? out.data : "", 1, out.len, stdout) != out.len)
        rc = err_set(err, ERR_IO, "the text cannot be written");
    if (rc == ERR_OK && isatty(STDOUT_FILENO))
        putchar('\n');
    free(ids.ids);
    buf_free(&out);
    return rc;
}

int cmd_tokenize(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, options, "tokenize --base FILE [options] [TEXT|-]",
                                about, 0, 1, &code);
    if (o == NULL)
        return code;
    if (opt_str(o, "base") == NULL && opt_str(o, "tokenizer") == NULL) {
        opts_free(o);
        return fail(2, "--base FILE or --tokenizer FILE is missing");
    }
    struct err err = { 0 };
    struct tokenizer *t = NULL;
    struct buf input;
    buf_init(&input, MAX_INPUT);
    const char *text = opts_nargs(o) > 0 ? opts_arg(o, 0) : "-";
    size_t len = strlen(text);
    int rc = load(o, &t, &err);
    if (rc == ERR_OK && strcmp(text, "-") == 0) {
        rc = read_stdin(&input, &err);
        text = input.data != NULL ? input.data : "";
        len = input.len;
    }
    if (rc == ERR_OK)
        rc = (opt_flag(o, "decode") ? decode : encode)(o, t, text, len, &err);
    if (rc == ERR_OK && fflush(stdout) != 0)
        rc = err_set(&err, ERR_IO, "the result cannot be written");
    code = rc == ERR_OK ? 0 : fail(1, "%s", err.msg);
    tokenizer_free(t);
    buf_free(&input);
    opts_free(o);
    return code;
}
