/* bench_tokenizer.c - how fast text becomes ids and ids text, on one thread: English books, whole and in
 * pieces of a prompt's size, with the vocabularies of real models. */
#include "server/bench_parts.h"

#include "engine/tokenizer.h"
#include "engine/util.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 4000, TEXT = 4 << 20, TEXT_QUICK = 256 << 10, FILE_MAX = 64 << 20 };

struct texts {
    const struct bench *b;
    const struct tokenizer *t;
    const struct buf *text;
    size_t piece;
    struct tok_ids ids;   /* of the whole text, for decoding */
    struct buf out;
    struct err err;       /* of the last round */
};

static int is_book(const struct dirent *e) { return e->d_name[0] != '.'; }

/* Books of a folder in the order of their names, one after the other, as many as fit. */
static int read_books(const char *dir, struct buf *all, struct err *err)
{
    struct dirent **books = NULL;
    const int n = scandir(dir, &books, is_book, alphasort);
    int rc = ERR_OK;
    for (int i = 0; i < n; i++) {
        char path[1400], *text = NULL;
        size_t len;
        snprintf(path, sizeof path, "%s/%s", dir, books[i]->d_name);
        free(books[i]);
        if (rc != ERR_OK || all->len == all->max)
            continue;
        rc = file_read(path, FILE_MAX, &text, &len, err);
        if (rc == ERR_OK)
            rc = buf_add(all, text, len < all->max - all->len ? len : all->max - all->len);
        free(text);
    }
    free(books);
    return rc;
}

static void encode(void *arg)
{
    struct texts *x = arg;
    x->ids.n = 0;
    for (size_t at = 0; at < x->text->len && x->err.code == ERR_OK; at += x->piece)
        tokenizer_encode(x->t, x->text->data + at,
                         x->text->len - at < x->piece ? x->text->len - at : x->piece, false, true, 0, &x->ids,
                         &x->err);
}

static void decode(void *arg)
{
    struct texts *x = arg;
    x->out.len = 0;
    tokenizer_decode(x->t, x->ids.ids, x->ids.n, false, &x->out, &x->err);
}

static int rate(struct texts *x, void (*fn)(void *arg), double *ret, struct err *err)
{
    *ret = (double)x->text->len / bench_time(x->b, fn, x) * 1e-6;
    return x->err.code == ERR_OK ? ERR_OK : err_set(err, x->err.code, "%s", x->err.msg);
}

static int encode_rate(void *arg, double *ret, struct err *err) { return rate(arg, encode, ret, err); }
static int decode_rate(void *arg, double *ret, struct err *err) { return rate(arg, decode, ret, err); }

static int measure(struct bench *b, const char *name, const struct tokenizer *t, const struct buf *text,
                   struct err *err)
{
    static const char *const what[] = { "encode", "pieces", "decode" };
    struct texts whole = { .b = b, .t = t, .text = text, .piece = text->len }, pieces = whole;
    pieces.piece = PIECE;
    buf_init(&whole.out, 4 * text->len);
    struct bench_series s[] = {
        { .name = "MB/s, whole books", .unit = "MB/s", .measure = encode_rate, .arg = &whole },
        { .name = "MB/s, pieces", .unit = "MB/s", .measure = encode_rate, .arg = &pieces },
        { .name = "MB/s, decoding", .unit = "MB/s", .measure = decode_rate, .arg = &whole },
    };
    int rc = bench_measure(b, s, 3, err);
    for (int i = 0; i < 3 && rc == ERR_OK; i++)
        rc = bench_row(b, &s[i], i == 1 ? &s[0] : NULL, 1, err, "tokenizer.%s.%s", name, what[i]);
    if (rc == ERR_OK)
        rc = bench_number(b, (double)text->len / (double)whole.ids.n, "bytes", NULL, err,
                          "tokenizer.%s.bytes_per_token", name);
    free(whole.ids.ids);
    free(pieces.ids.ids);
    buf_free(&whole.out);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    static const char *const names[] = { "gpt2", "llama2-tinyllama", "qwen2.5", "smollm2" };
    struct buf text;
    char path[1100];
    if (b->shared == NULL) {
        bench_skip(b, "tokenizer", "the books and vocabularies are not there; --shared DIR says where");
        return ERR_OK;
    }
    buf_init(&text, b->quick ? TEXT_QUICK : TEXT);
    snprintf(path, sizeof path, "%.1000s/data/gutenberg", b->shared);
    int rc = read_books(path, &text, err);
    if (rc == ERR_OK && text.len == 0)
        bench_skip(b, "tokenizer", "there are no books in %.200s", path);
    for (size_t i = 0; i < sizeof names / sizeof names[0] && text.len > 0 && rc == ERR_OK; i++) {
        struct tokenizer *t = NULL;
        char *json = NULL;
        size_t len;
        snprintf(path, sizeof path, "%.1000s/tokenizers/%s/tokenizer.json", b->shared, names[i]);
        rc = file_read(path, FILE_MAX, &json, &len, err);
        if (rc == ERR_OK)
            rc = tokenizer_load(json, len, &t, err);
        if (rc == ERR_OK)
            rc = measure(b, names[i], t, &text, err);
        tokenizer_free(t);
        free(json);
    }
    buf_free(&text);
    return rc;
}

const struct bench_part bench_tokenizer = { "tokenizer", "text to ids and back, on one thread (--shared)", run };
