/* bench_tokenizer.c - how fast text becomes ids and ids text, on one thread: English books of the
 * shared folder, whole and in pieces of a prompt's size, with every vocabulary that is there. */
#include "engine/tokenizer.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PIECE = 4000, MAX_TEXT = 64 << 20 };

/* Seconds of CPU: one thread works, whatever else the machine does. */
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void must(int rc, const struct err *err)
{
    if (rc == ERR_OK)
        return;
    fprintf(stderr, "%s\n", err->msg);
    exit(1);
}

/* All books, one after the other; empty if there are none. */
static struct buf read_books(void)
{
    struct buf all;
    struct err err = { 0 };
    buf_init(&all, MAX_TEXT);
    const char *dir = support_shared("data/gutenberg");
    DIR *d = dir ? opendir(dir) : NULL;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        char path[1200], *text;
        size_t len;
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        must(file_read(path, MAX_TEXT, &text, &len, &err), &err);
        must(buf_add(&all, text, len), &err);
        free(text);
    }
    if (d != NULL)
        closedir(d);
    return all;
}

/* Seconds for one pass over the text in pieces of `step`; ids of the last pass in `ids`. */
static double encode(const struct tokenizer *t, const struct buf *text, size_t step,
                     struct tok_ids *ids)
{
    struct err err = { 0 };
    double best = 1e9;
    for (int round = 0; round < 3; round++) {
        const double start = now();
        ids->n = 0;
        for (size_t at = 0; at < text->len; at += step)
            must(tokenizer_encode(t, text->data + at,
                                  text->len - at < step ? text->len - at : step, false, true, 0,
                                  ids, &err), &err);
        const double took = now() - start;
        best = took < best ? took : best;
    }
    return best;
}

static void measure(const char *name, const struct buf *text)
{
    char rel[200], *json;
    size_t len;
    struct err err = { 0 };
    struct tokenizer *t;
    struct tok_ids ids = { 0 };
    struct buf out;
    snprintf(rel, sizeof rel, "tokenizers/%s/tokenizer.json", name);
    const char *path = support_shared(rel);
    if (path == NULL)
        return;
    must(file_read(path, MAX_TEXT, &json, &len, &err), &err);
    const double start = now();
    must(tokenizer_load(json, len, &t, &err), &err);
    const double loaded = now();
    const double pieces = encode(t, text, PIECE, &ids), whole = encode(t, text, text->len, &ids);
    buf_init(&out, 2 * MAX_TEXT);
    const double before = now();
    must(tokenizer_decode(t, ids.ids, ids.n, false, &out, &err), &err);
    const double decoded = now() - before, mb = (double)text->len / 1e6;
    printf("%-16s load %3.0f ms, encode %5.1f MB/s whole, %5.1f MB/s in pieces of %d, decode %5.1f "
           "MB/s, %.2f bytes per token\n", name, 1e3 * (loaded - start), mb / whole, mb / pieces,
           PIECE, mb / decoded, (double)text->len / (double)ids.n);
    buf_free(&out);
    free(ids.ids);
    free(json);
    tokenizer_free(t);
}

int main(void)
{
    static const char *const names[] = { "gpt2", "llama2-tinyllama", "qwen2.5", "smollm2" };
    struct buf text = read_books();
    if (text.len == 0)
        return 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        measure(names[i], &text);
    buf_free(&text);
    return 0;
}
