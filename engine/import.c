/* import.c - Hugging Face folder or GGUF file -> base file.
 *
 * First everything is checked that needs no values: options, config, that each weight of the model
 * is there with the right shape and nothing else is.  Only then the output is opened, and tensors
 * stream through one by one; a separate thread hashes the source's files meanwhile.  The hashes
 * stand in the header, in front of the data they are made from: they are declared as zeros and
 * patched at the end. */
#include "engine/base.h"
#include "engine/chat_template.h"

#include "engine/import_int.h"
#include "engine/util.h"

#include <jansson.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct import {
    struct source src;
    struct base_import_opts opts;
    enum form linear, head, embed;
    char *name;
    struct item *items;
    size_t nitems;
    size_t done, total; /* bytes of source tensors */
    bool requantized;   /* and the user was told */
    struct scratch scratch;
    struct st_writer *out;
};

static const char *const form_names[] = {
    [FORM_F32] = "f32", [FORM_BF16] = "bf16", [FORM_NF4] = "nf4", [FORM_Q8] = "8bit",
};

/* --- options -------------------------------------------------------------------------- */

/* `allowed` is a set of forms as bits. */
static int parse_form(const char *what, const char *value, enum form def, unsigned allowed,
                      enum form *ret, struct err *err)
{
    if (value == NULL) {
        *ret = def;
        return ERR_OK;
    }
    char list[40] = "";
    for (int f = FORM_F32; f <= FORM_Q8; f++) {
        if (!(allowed >> f & 1))
            continue;
        if (strcmp(value, form_names[f]) == 0) {
            *ret = (enum form)f;
            return ERR_OK;
        }
        sprintf(list + strlen(list), "%s%s", list[0] ? ", " : "", form_names[f]);
    }
    return err_set(err, ERR_INVALID, "%s \"%.40s\" is unknown; known: %s", what, value, list);
}

static int parse_options(struct import *im, struct err *err)
{
    const struct base_import_opts *o = &im->opts;
    int rc = parse_form("type", o->type, FORM_NF4, 1u << FORM_NF4 | 1u << FORM_F32, &im->linear,
                        err);
    bool f32 = im->linear == FORM_F32;
    if (rc == ERR_OK)
        rc = parse_form("head", o->head, f32 ? FORM_F32 : FORM_Q8, 15, &im->head, err);
    if (rc == ERR_OK)
        rc = parse_form("embed", o->embed, f32 ? FORM_F32 : FORM_BF16,
                        1u << FORM_F32 | 1u << FORM_BF16, &im->embed, err);
    return rc;
}

/* The folder's or file's own name, also when it was given as "." or with a slash at the end. */
static int choose_name(struct import *im, const char *dir, struct err *err)
{
    char real[PATH_MAX];
    if (im->opts.name != NULL)
        im->name = strdup(im->opts.name);
    else if (realpath(dir, real) != NULL)
        im->name = strdup(basename(real));
    else
        return err_set(err, ERR_IO, "%s: not a folder or file that can be read", dir);
    if (im->name == NULL)
        return err_nomem(err);
    size_t len = strlen(im->name);
    if (im->opts.name == NULL && len > 5 && strcmp(im->name + len - 5, ".gguf") == 0)
        im->name[len -= 5] = '\0';
    bool bad = len == 0 || len > 200;
    for (size_t i = 0; i < len; i++)
        bad |= (unsigned char)im->name[i] <= ' ' || im->name[i] == 0x7f;
    if (bad)
        return err_set(err, ERR_INVALID,
                       "the name \"%.200s\" is not 1 to 200 characters without spaces; give another",
                       im->name);
    return ERR_OK;
}

static void note(const struct import *im, const char *sentence)
{
    if (im->opts.note)
        im->opts.note(im->opts.ud, sentence);
}

/* --- what will be written ------------------------------------------------------------- */

static enum form form_of(const struct import *im, const struct weight *w)
{
    switch (w->kind) {
    case W_LINEAR:
        return im->linear;
    case W_EMBED:
    case W_POSITIONS:
        return im->embed;
    case W_HEAD:
        return im->head;
    default:
        return FORM_F32;
    }
}

/* Blocks of the panel layouts must not cross rows. */
static void fit_head(struct import *im)
{
    int K = im->src.arch.D;
    if (K % 64 == 0 || (im->head != FORM_Q8 && im->head != FORM_NF4))
        return;
    char text[160];
    snprintf(text, sizeof text,
             "hidden_size %d is not a multiple of 64: the head is kept as bf16 instead of %s", K,
             form_names[im->head]);
    note(im, text);
    im->head = FORM_BF16;
}

/* A tied model whose file has a head nevertheless: only if it is the embedding. */
static int check_tied_head(struct import *im, const struct item *head, struct err *err)
{
    if (source_find(&im->src, head->w.name) == NULL)
        return ERR_OK;
    const struct source_tensor *src = source_take(&im->src, head->w.name, head->w.N, head->w.K,
                                                  err);
    if (src == NULL)
        return ERR_INVALID;
    const struct st_tensor *t = src->t, *embed = head->src->t;
    if (src->q4 != NULL || head->src->q4 != NULL || t->dtype != embed->dtype ||
        t->bytes != embed->bytes || memcmp(t->data, embed->data, t->bytes) != 0)
        return err_set(err, ERR_INVALID,
                       "tensor %s differs from %s, but config.json says tie_word_embeddings",
                       head->w.name, embed->name);
    return ERR_OK;
}

/* 4-bit weights that are not NF4 would be rounded a second time: only if the user says so. */
static int check_requantize(struct import *im, const struct item *it, struct err *err)
{
    const struct q4_source *q = it->src->q4;
    if (it->src->blocks != NULL && it->form == FORM_NF4 && !im->requantized) {
        char text[200];
        snprintf(text, sizeof text, "the source's weights are %s and the like: they become fp32 and "
                 "then NF4, so what they lost and what NF4 loses add up", it->src->blocks->name);
        note(im, text);
        im->requantized = true;
    }
    if (q == NULL || bnb_is_nf4(q) || it->form != FORM_NF4)
        return ERR_OK;
    if (!im->opts.requantize)
        return err_set(err, ERR_INVALID,
                       "tensor %s is %s in blocks of %zu, and the kernels read NF4 in blocks of 64 "
                       "with the usual codebooks; --requantize turns it into that, which adds "
                       "NF4's rounding to the one it has",
                       it->w.name, q->type == Q4_FP4 ? "FP4" : "NF4", q->block);
    if (!im->requantized)
        note(im, "the source's 4-bit weights are quantised a second time, to NF4: what they lost "
                 "and what NF4 loses add up");
    im->requantized = true;
    return ERR_OK;
}

/* Find the source of one more item and count it, unless the embedding serves as head. */
static int add_item(struct import *im, const struct weight *w, struct err *err)
{
    bool tied_head = w->kind == W_HEAD && im->src.arch.tied;
    const struct source_tensor *src = source_find(&im->src, w->name);
    /* bitsandbytes turns such a matrix before it quantises it. */
    const bool turned = w->kind == W_LINEAR && family_find(im->src.arch.family)->transposed &&
                        (src == NULL || src->q4 == NULL);
    struct item it = { .w = *w, .form = form_of(im, w), .has_digest = !tied_head,
                       .transposed = turned };
    it.src = tied_head ? im->items[0].src /* the embedding */
             : turned  ? source_take(&im->src, w->name, w->K, w->N, err)
                       : source_take(&im->src, w->name, w->N, w->K, err);
    if (it.src == NULL)
        return ERR_INVALID;
    int rc = tied_head ? check_tied_head(im, &it, err) : check_requantize(im, &it, err);
    if (rc != ERR_OK || (tied_head && it.form == im->embed))
        return rc;
    im->total += it.src->t->bytes;
    im->items[im->nitems++] = it;
    return ERR_OK;
}

static int plan(struct import *im, struct err *err)
{
    struct weight *weights = NULL;
    size_t n = 0;
    int rc = base_weights(&im->src.arch, &weights, &n, err);
    if (rc != ERR_OK)
        return rc;
    im->items = calloc(n, sizeof *im->items);
    if (im->items == NULL) {
        free(weights);
        return err_nomem(err);
    }
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        rc = add_item(im, &weights[i], err);
    free(weights);
    return rc == ERR_OK ? source_check_all_used(&im->src, err) : rc;
}

/* --- hashes --------------------------------------------------------------------------- */

struct sorted {
    const struct item *it;
};

static int by_name(const void *pa, const void *pb)
{
    const struct sorted *a = pa, *b = pb;
    return strcmp(a->it->w.name, b->it->w.name);
}

/* The canonical hash, and the digests that it is made from as JSON; free() *ret_digests. */
static int hash_items(const struct import *im, char ret_hex[65], char **ret_digests,
                      struct err *err)
{
    struct sorted *order = calloc(im->nitems, sizeof *order);
    json_t *o = json_object();
    size_t n = 0;
    if (order == NULL || o == NULL) {
        free(order);
        json_decref(o);
        return err_nomem(err);
    }
    for (size_t i = 0; i < im->nitems; i++)
        if (im->items[i].has_digest)
            order[n++].it = &im->items[i];
    qsort(order, n, sizeof *order, by_name);
    struct sha256 h;
    uint8_t digest[32];
    sha256_init(&h);
    for (size_t i = 0; i < n; i++) {
        const struct item *it = order[i].it;
        char hex[65];
        sha256_add(&h, it->w.name, strlen(it->w.name) + 1);
        sha256_add(&h, it->digest, 32);
        hex32(it->digest, hex);
        json_object_set_new(o, it->w.name, json_string(hex));
    }
    sha256_end(&h, digest);
    hex32(digest, ret_hex);
    *ret_digests = json_object_size(o) == n ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    free(order);
    return *ret_digests ? ERR_OK : err_nomem(err);
}

struct hasher {
    const struct source *src;
    atomic_bool stop;
    char hex[65];
};

static void *hash_thread(void *arg)
{
    struct hasher *h = arg;
    source_hash(h->src, &h->stop, h->hex);
    return NULL;
}

/* --- writing -------------------------------------------------------------------------- */

static int put_meta(struct import *im, const char *key, const char *value, struct err *err)
{
    return value ? st_writer_meta(im->out, key, value, strlen(value), err) : ERR_OK;
}

static const char *text_of(const struct source *s, const char *name)
{
    const struct source_file *f = source_text(s, name);
    return f ? f->text : NULL;
}

static int declare_all(struct import *im, struct err *err)
{
    char *arch = arch_to_json(&im->src.arch), *digests = NULL;
    char zeros[65];
    int rc = arch ? hash_items(im, zeros, &digests, err) : err_nomem(err);
    const struct {
        const char *key, *value;
    } meta[] = {
        { "lorad.format", BASE_FORMAT },
        { "lorad.arch", arch },
        { "lorad.name", im->name },
        { "lorad.type", form_names[im->linear] },
        { "lorad.head", form_names[im->head] },
        { "lorad.embed", form_names[im->embed] },
        { "lorad.source", zeros },
        { "lorad.hash", zeros },
        { "lorad.digests", digests },
        { "lorad.tokenizer", text_of(&im->src, "tokenizer.json") },
        { "lorad.tokenizer_config", text_of(&im->src, "tokenizer_config.json") },
        { "lorad.chat_template", im->src.chat_template },
    };
    for (size_t i = 0; i < sizeof meta / sizeof meta[0] && rc == ERR_OK; i++)
        rc = put_meta(im, meta[i].key, meta[i].value, err);
    for (size_t i = 0; i < im->nitems && rc == ERR_OK; i++)
        rc = item_declare(&im->items[i], im->out, err);
    free(arch);
    free(digests);
    return rc == ERR_OK ? st_writer_begin(im->out, err) : rc;
}

static int tick(struct import *im, const char *tensor, struct err *err)
{
    if (im->opts.progress && im->opts.progress(im->opts.ud, tensor, im->done, im->total))
        return err_set(err, ERR_CANCELLED, "import was stopped");
    return ERR_OK;
}

static int write_items(struct import *im, struct err *err)
{
    int rc = ERR_OK;
    for (size_t i = 0; i < im->nitems && rc == ERR_OK; i++) {
        rc = tick(im, im->items[i].w.name, err);
        if (rc == ERR_OK)
            rc = item_write(&im->items[i], &im->scratch, im->out, err);
        source_forget(&im->src, im->items[i].src);
        im->done += im->items[i].src->t->bytes;
    }
    return rc;
}

static int patch_hashes(struct import *im, const char *source_hex, struct err *err)
{
    char hex[65], *digests = NULL;
    int rc = hash_items(im, hex, &digests, err);
    if (rc == ERR_OK)
        rc = st_writer_patch(im->out, "lorad.source", source_hex, 64, err);
    if (rc == ERR_OK)
        rc = st_writer_patch(im->out, "lorad.hash", hex, 64, err);
    if (rc == ERR_OK)
        rc = st_writer_patch(im->out, "lorad.digests", digests, strlen(digests), err);
    free(digests);
    return rc;
}

static int write_file(struct import *im, const char *path, struct err *err)
{
    pthread_t thread;
    struct hasher hasher = { .src = &im->src };
    int rc = scratch_init(&im->scratch, (size_t)im->src.arch.D, err);
    if (rc == ERR_OK)
        rc = st_writer_open(path, true, &im->out, err);
    if (rc != ERR_OK)
        return rc;
    if (pthread_create(&thread, NULL, hash_thread, &hasher) != 0)
        return err_set(err, ERR_NOMEM, "cannot start a thread");
    rc = declare_all(im, err);
    if (rc == ERR_OK)
        rc = write_items(im, err);
    if (rc != ERR_OK)
        atomic_store(&hasher.stop, true);
    pthread_join(thread, NULL);
    if (rc == ERR_OK)
        rc = patch_hashes(im, hasher.hex, err);
    if (rc == ERR_OK)
        rc = tick(im, "", err);
    if (rc != ERR_OK)
        return rc;
    struct st_writer *out = im->out;
    im->out = NULL;
    return st_writer_commit(out, err);
}

/* The template that was asked for instead of the source's; whichever it is, it must be one. */
static int take_template(struct import *im, const char *dir, struct err *err)
{
    struct chat_template *t = NULL;
    char *text = NULL, name[300];
    size_t len;
    if (im->opts.chat_template != NULL) {
        int rc = file_read(im->opts.chat_template, (size_t)4 << 20, &text, &len, err);
        if (rc == ERR_OK && strlen(text) != len) {
            free(text);
            rc = err_set(err, ERR_INVALID, "%s contains a zero byte", im->opts.chat_template);
        }
        if (rc != ERR_OK)
            return rc;
        free(im->src.chat_template);
        im->src.chat_template = text;
    }
    if (im->src.chat_template == NULL)
        return ERR_OK;
    snprintf(name, sizeof name, "the chat template of %.250s", text ? im->opts.chat_template : dir);
    int rc = chat_template_open(name, im->src.chat_template,
                                text_of(&im->src, "tokenizer_config.json"), &t, err);
    chat_template_free(t);
    return rc;
}

int base_import(const char *dir, const char *out, const struct base_import_opts *opts,
                struct err *err)
{
    struct import im = { 0 };
    if (opts != NULL)
        im.opts = *opts;
    int rc = parse_options(&im, err);
    if (rc == ERR_OK)
        rc = choose_name(&im, dir, err);
    if (rc == ERR_OK)
        rc = source_open(dir, &im.src, err);
    if (rc == ERR_OK)
        rc = take_template(&im, dir, err);
    if (rc == ERR_OK) {
        fit_head(&im);
        rc = plan(&im, err);
    }
    if (rc == ERR_OK)
        rc = write_file(&im, out, err);
    st_writer_abort(im.out);
    scratch_free(&im.scratch);
    source_close(&im.src);
    free(im.items);
    free(im.name);
    return rc;
}
