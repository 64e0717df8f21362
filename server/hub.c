/* hub.c - which files of a repository are needed, where they go, and the order of things: the list of
 * files, small files, then the weights that these name. */
#include "server/hub_int.h"

#include "server/options.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { LIST_MAX = 64 << 20, INDEX_MAX = 64 << 20, FILES_MAX = 1024, SMALL_MAX = 256 << 20 };

static const char weights[] = "model.safetensors", index_name[] = "model.safetensors.index.json";
static const char adapter_config[] = "adapter_config.json";
static const char adapter_weights[] = "adapter_model.safetensors";

/* Beside the weights, if the repository has them. */
static const char *const model_files[] = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
};

/* --- names --------------------------------------------------------------------------------------- */

static bool plain(const char *s, size_t n, const char *also)
{
    static const char good[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    if (n == 0 || s[0] == '.' || s[0] == '-' || s[0] == '/')
        return false;
    for (size_t i = 0; i < n; i++)
        if (strchr(good, s[i]) == NULL && strchr(also, s[i]) == NULL)
            return false;
    for (size_t i = 1; i < n; i++)
        if (s[i - 1] == '.' && s[i] == '.')
            return false;
    return true;
}

int hub_ref_parse(const char *text, struct hub_ref *ret, struct err *err)
{
    const char *slash = strchr(text, '/'), *at = strchr(text, '@');
    const size_t len = at != NULL ? (size_t)(at - text) : strlen(text);
    const char *rev = at != NULL ? at + 1 : "main";
    const size_t org = slash != NULL ? (size_t)(slash - text) : len;
    if (slash == NULL || len >= sizeof ret->repo || org >= len || !plain(text, org, "") ||
        !plain(slash + 1, len - org - 1, "") || strlen(rev) >= sizeof ret->rev ||
        !plain(rev, strlen(rev), "/"))
        return err_set(err, ERR_INVALID, "\"%.100s\" is not ORG/NAME or ORG/NAME@REVISION", text);
    memcpy(ret->repo, text, len);
    ret->repo[len] = '\0';
    ret->name = ret->repo + org + 1;
    snprintf(ret->rev, sizeof ret->rev, "%s", rev);
    return ERR_OK;
}

/* --- the folder ------------------------------------------------------------------------------------ */

static int make_folder(const char *path, struct err *err)
{
    char *p = strdup(path);
    if (p == NULL)
        return err_nomem(err);
    int rc = ERR_OK;
    for (char *s = p + 1; rc == ERR_OK; s++) {
        const char c = *s;
        if (c != '/' && c != '\0')
            continue;
        *s = '\0';
        if (mkdir(p, 0777) != 0 && errno != EEXIST)
            rc = err_set(err, errno == ENOSPC ? ERR_UNAVAILABLE : ERR_IO,
                         "cannot make the folder %s: %s", p, strerror(errno));
        *s = c;
        if (c == '\0')
            break;
    }
    free(p);
    return rc;
}

/* CACHE/hub/ORG--NAME/COMMIT, made. */
static int cache_folder(const struct hub *h, const char *commit, char **ret, struct err *err)
{
    const char *given = h->o->cache, *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    const char *root = given ? given : xdg && xdg[0] == '/' ? xdg : home;
    if (root == NULL || root[0] == '\0')
        return err_set(err, ERR_INVALID, "where to keep files? Give --cache DIR, or set HOME");
    const char *below = given ? "" : xdg && xdg[0] == '/' ? "/lorad" : "/.cache/lorad";
    const int org = (int)(h->ref->name - h->ref->repo) - 1;
    char *dir = NULL;
    if (asprintf(&dir, "%s%s/hub/%.*s--%s/%s", root, below, org, h->ref->repo, h->ref->name, commit) < 0)
        return err_nomem(err);
    int rc = make_folder(dir, err);
    if (rc != ERR_OK)
        free(dir);
    else
        *ret = dir;
    return rc;
}

/* --- the list of files --------------------------------------------------------------------------- */

struct listing {
    char commit[41];
    json_t *files; /* name -> entry of the list */
};

static bool hex_parse(const char *s, uint8_t *ret, size_t bytes)
{
    if (s == NULL || strlen(s) != 2 * bytes)
        return false;
    for (size_t i = 0; i < bytes; i++) {
        unsigned v;
        if (strspn(s + 2 * i, "0123456789abcdefABCDEF") < 2 || sscanf(s + 2 * i, "%2x", &v) != 1)
            return false;
        ret[i] = (uint8_t)v;
    }
    return true;
}

static int read_listing(const struct hub *h, const struct buf *text, struct listing *ret,
                        struct err *err)
{
    uint8_t commit[20];
    json_t *j = json_loadb(text->data ? text->data : "", text->len, JSON_REJECT_DUPLICATES, NULL);
    const char *sha = json_string_value(json_object_get(j, "sha"));
    const json_t *all = json_object_get(j, "siblings");
    int rc = ERR_OK;
    if (!hex_parse(sha, commit, sizeof commit) || !json_is_array(all))
        rc = err_set(err, ERR_INVALID,
                     "%s: the answer of %s is not a list of files (no `sha` and `siblings`)",
                     h->ref->repo, h->endpoint);
    ret->files = json_object();
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(all); i++) {
        json_t *e = json_array_get(all, i);
        const char *name = json_string_value(json_object_get(e, "rfilename"));
        if (name == NULL)
            continue;
        if (json_object_get(ret->files, name) != NULL)
            rc = err_set(err, ERR_INVALID, "%s: the hub lists a file twice", h->ref->repo);
        else if (json_object_set(ret->files, name, e) != 0)
            rc = err_nomem(err);
    }
    if (rc == ERR_OK)
        snprintf(ret->commit, sizeof ret->commit, "%s", sha);
    json_decref(j);
    return rc;
}

static int get_listing(struct hub *h, struct listing *ret, struct err *err)
{
    struct buf text;
    struct transfer t = { .what = "the list of files", .text = &text };
    char *rev = curl_easy_escape(NULL, h->ref->rev, 0);
    buf_init(&text, LIST_MAX);
    int rc = ERR_OK;
    if (rev == NULL || asprintf(&t.url, "%s/api/models/%s/revision/%s?blobs=true", h->endpoint,
                                h->ref->repo, rev) < 0) {
        t.url = NULL;
        rc = err_nomem(err);
    }
    if (rc == ERR_OK)
        rc = hub_run(h, &t, 1, "", err);
    if (rc == ERR_OK)
        rc = read_listing(h, &text, ret, err);
    curl_free(rev);
    free(t.url);
    buf_free(&text);
    return rc;
}

static bool listed(const struct listing *l, const char *name)
{
    return json_object_get(l->files, name) != NULL;
}

/* Size and hash of a listed file.  One whose content cannot be checked is not downloaded. */
static int describe(const struct hub *h, const struct listing *l, const char *name,
                    struct hub_file *ret, struct err *err)
{
    const json_t *e = json_object_get(l->files, name), *lfs = json_object_get(e, "lfs");
    const bool has_lfs = json_is_object(lfs);
    const json_t *size = json_object_get(has_lfs ? lfs : e, "size");
    const char *sha256 = json_string_value(json_object_get(lfs, "sha256"));
    const char *sha1 = json_string_value(json_object_get(e, "blobId"));
    memset(ret, 0, sizeof *ret);
    snprintf(ret->name, sizeof ret->name, "%s", name);
    ret->lfs = has_lfs;
    if (size == NULL)
        size = json_object_get(e, "size");
    if (!json_is_integer(size) || json_integer_value(size) < 0 ||
        !(has_lfs ? hex_parse(sha256, ret->sha256, 32) : hex_parse(sha1, ret->sha1, 20)))
        return err_set(err, ERR_INVALID, "%s: the hub does not say the size and hash of %s, so it "
                       "cannot be checked", h->ref->repo, name);
    ret->size = (uint64_t)json_integer_value(size);
    return ERR_OK;
}

/* --- downloading ------------------------------------------------------------------------------------ */

struct batch {
    struct hub_file *files;
    size_t n;
};

static int batch_add(const struct hub *h, const struct listing *l, const char *name, struct batch *b,
                     struct err *err)
{
    if (b->n == FILES_MAX)
        return err_set(err, ERR_TOO_LARGE, "%s has more than %d files of weights", h->ref->repo,
                       FILES_MAX);
    if (!listed(l, name))
        return err_set(err, ERR_NOT_FOUND, "%s@%s has no %s", h->ref->repo, h->ref->rev, name);
    int rc = describe(h, l, name, &b->files[b->n], err);
    if (rc == ERR_OK)
        b->n++;
    return rc;
}

/* Is there room for what is still to come? */
static int check_room(int dir, const struct batch *b, struct err *err)
{
    struct statvfs fs;
    uint64_t need = 0;
    for (size_t i = 0; i < b->n; i++) {
        char part[HUB_NAME_MAX + 6];
        struct stat st;
        snprintf(part, sizeof part, "%s.part", b->files[i].name);
        const bool begun = fstatat(dir, part, &st, AT_SYMLINK_NOFOLLOW) == 0;
        const uint64_t have = begun ? (uint64_t)st.st_size : 0, size = b->files[i].size;
        const uint64_t more = part_is_done(dir, &b->files[i]) || have > size ? 0 : size - have;
        need = need + more < need ? UINT64_MAX : need + more;
    }
    if (fstatvfs(dir, &fs) != 0)
        return ERR_OK; /* writing will tell */
    const uint64_t room = (uint64_t)fs.f_bavail * fs.f_frsize;
    char a[32], c[32];
    if (need > room)
        return err_set(err, ERR_UNAVAILABLE, "%s are still to be downloaded, and the disk of the cache "
                       "has %s left", human_bytes((size_t)need, a), human_bytes((size_t)room, c));
    return ERR_OK;
}

static int download(struct hub *h, const struct listing *l, int dir, const struct batch *b,
                    struct err *err)
{
    struct transfer *t = calloc(b->n + 1, sizeof *t);
    struct part *parts = calloc(b->n + 1, sizeof *parts);
    size_t n = 0;
    int rc = t == NULL || parts == NULL ? err_nomem(err) : check_room(dir, b, err);
    for (size_t i = 0; rc == ERR_OK && i < b->n; i++) {
        const struct hub_file *f = &b->files[i];
        if (part_is_done(dir, f))
            continue;
        struct transfer *x = &t[n];
        x->part = &parts[n];
        x->what = f->name;
        n++;
        rc = part_open(x->part, dir, f, err);
        if (rc == ERR_OK && asprintf(&x->url, "%s/%s/resolve/%s/%s", h->endpoint, h->ref->repo,
                                     l->commit, f->name) < 0) {
            x->url = NULL;
            rc = err_nomem(err);
        }
    }
    if (rc == ERR_OK && n > 0)
        rc = hub_run(h, t, n, h->ref->name, err);
    for (size_t i = 0; i < n; i++) {
        part_close(&parts[i]);
        free(t[i].url);
    }
    free(t);
    free(parts);
    return rc;
}

/* --- which files ---------------------------------------------------------------------------------------- */

static bool ends_in(const char *name, const char *end)
{
    const size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

/* The shards that the index names, each once. */
static int add_shards(const struct hub *h, const struct listing *l, const char *dir, struct batch *b,
                      struct err *err)
{
    char *path = path_join(dir, index_name), *text = NULL;
    size_t len = 0;
    int rc = path == NULL ? err_nomem(err) : file_read(path, INDEX_MAX, &text, &len, err);
    json_t *j = rc == ERR_OK ? json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL) : NULL;
    json_t *map = json_object_get(j, "weight_map"), *seen = json_object();
    free(path);
    free(text);
    if (rc == ERR_OK && (!json_is_object(map) || json_object_size(map) == 0))
        rc = err_set(err, ERR_INVALID, "%s: %s has no weight_map", h->ref->repo, index_name);
    const char *tensor;
    json_t *v;
    json_object_foreach(map, tensor, v) {
        const char *name = json_string_value(v);
        if (rc != ERR_OK || (name != NULL && json_object_get(seen, name) != NULL))
            continue;
        if (name == NULL || strlen(name) > HUB_NAME_MAX || !plain(name, strlen(name), "") ||
            !ends_in(name, ".safetensors"))
            rc = err_set(err, ERR_INVALID,
                         "%s: %s names a file of weights that is not a plain NAME.safetensors",
                         h->ref->repo, index_name);
        else if (json_object_set_new(seen, name, json_true()) != 0)
            rc = err_nomem(err);
        else
            rc = batch_add(h, l, name, b, err);
    }
    json_decref(seen);
    json_decref(j);
    return rc;
}

static int no_weights(const struct hub *h, const struct listing *l, const char *what,
                      const char *pickle, struct err *err)
{
    return err_set(err, ERR_INVALID, "%s@%s has no %s%s", h->ref->repo, h->ref->rev, what,
                   listed(l, pickle) ? ": its weights are pickled, which can run code and is not read"
                                     : "");
}

static int fetch_model(struct hub *h, const struct listing *l, const char *path, int dir,
                       struct batch *b, struct err *err)
{
    const bool single = listed(l, weights);
    if (!listed(l, "config.json"))
        return err_set(err, ERR_INVALID, "%s@%s has no config.json%s", h->ref->repo, h->ref->rev,
                       listed(l, adapter_config)
                           ? ": it is an adapter; lorad adapter add NAME hub:ORG/NAME takes it" : "");
    if (!single && !listed(l, index_name))
        return no_weights(h, l, "model.safetensors", "pytorch_model.bin", err);
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < sizeof model_files / sizeof model_files[0]; i++)
        if (listed(l, model_files[i]))
            rc = batch_add(h, l, model_files[i], b, err);
    if (rc == ERR_OK && !single)
        rc = batch_add(h, l, index_name, b, err);
    for (size_t i = 0; rc == ERR_OK && i < b->n; i++)
        if (b->files[i].size > SMALL_MAX)
            rc = err_set(err, ERR_TOO_LARGE, "%s: %s has %llu bytes, more than such a file can have",
                         h->ref->repo, b->files[i].name, (unsigned long long)b->files[i].size);
    if (rc == ERR_OK)
        rc = download(h, l, dir, b, err);
    b->n = 0;
    if (rc == ERR_OK)
        rc = single ? batch_add(h, l, weights, b, err) : add_shards(h, l, path, b, err);
    return rc == ERR_OK ? download(h, l, dir, b, err) : rc;
}

static int fetch_adapter(struct hub *h, const struct listing *l, int dir, struct batch *b,
                         struct err *err)
{
    if (!listed(l, adapter_config))
        return err_set(err, ERR_INVALID, "%s@%s has no adapter_config.json: it is not an adapter of PEFT",
                       h->ref->repo, h->ref->rev);
    if (!listed(l, adapter_weights))
        return no_weights(h, l, adapter_weights, "adapter_model.bin", err);
    int rc = batch_add(h, l, adapter_config, b, err);
    if (rc == ERR_OK)
        rc = batch_add(h, l, adapter_weights, b, err);
    return rc == ERR_OK ? download(h, l, dir, b, err) : rc;
}

static int fetch(struct hub *h, enum hub_kind kind, char **ret_dir, struct err *err)
{
    struct listing l = { .files = NULL };
    struct batch b = { .files = calloc(FILES_MAX, sizeof *b.files) };
    char *path = NULL;
    int dir = -1;
    int rc = b.files == NULL ? err_nomem(err) : get_listing(h, &l, err);
    if (rc == ERR_OK)
        rc = cache_folder(h, l.commit, &path, err);
    if (rc == ERR_OK && (dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        rc = err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    if (rc == ERR_OK)
        rc = kind == HUB_MODEL ? fetch_model(h, &l, path, dir, &b, err)
                               : fetch_adapter(h, &l, dir, &b, err);
    if (dir >= 0)
        close(dir);
    json_decref(l.files);
    free(b.files);
    if (rc == ERR_OK)
        *ret_dir = path;
    else
        free(path);
    return rc;
}

int hub_fetch(const struct hub_opts *o, const struct hub_ref *ref, enum hub_kind kind,
              char **ret_dir, struct err *err)
{
    struct hub h = { .o = o };
    int rc = hub_open(&h, o, ref, err);
    if (rc == ERR_OK)
        rc = fetch(&h, kind, ret_dir, err);
    hub_close(&h);
    return rc;
}

bool hub_opts_read(const struct opts *o, struct hub_opts *ret)
{
    int64_t jobs, stall;
    if (!opt_int(o, "jobs", 1, 32, &jobs) || !opt_int(o, "stall", 1, 3600, &stall))
        return false;
    *ret = (struct hub_opts){ .endpoint = opt_str(o, "endpoint"), .cache = opt_str(o, "cache"),
                              .jobs = (int)jobs, .stall_seconds = (int)stall };
    return true;
}
