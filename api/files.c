/* files.c - /v1/files: training data, checked line by line before it is kept. */
#include "api/api_int.h"
#include "engine/dataset.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static json_t *file_json(const struct store_file *f)
{
    json_t *expires = f->expires_ms > 0 ? json_integer(f->expires_ms / 1000) : json_null();
    return json_pack("{s:s, s:s, s:I, s:I, s:o, s:s, s:s, s:s, s:n}", "id", f->ref, "object", "file",
                     "bytes", (json_int_t)f->bytes, "created_at",
                     (json_int_t)(f->created_ms / 1000), "expires_at", expires, "filename", f->name,
                     "purpose", f->purpose, "status", "processed", "status_details");
}

/* --- POST /v1/files -F purpose=fine-tune -F file=@train.jsonl
 *                    [-F 'expires_after[anchor]=created_at' -F 'expires_after[seconds]=86400'] --- */

enum { P_FILE, P_PURPOSE, P_ANCHOR, P_SECONDS, P_COUNT };
static const char *const part_names[P_COUNT] = { "file", "purpose", "expires_after[anchor]",
                                                 "expires_after[seconds]" };
enum { EXPIRES_MIN = 3600, EXPIRES_MAX = 2592000, LINES_SHOWN = 5 };

static int sort_parts(const struct api_req *req, const struct api_part *part[P_COUNT],
                      struct err *err)
{
    int rc = form_parts(req, P_COUNT, part_names, "file, purpose and expires_after", part, err);
    if (rc != ERR_OK)
        return rc;
    for (int k = 0; k <= P_PURPOSE; k++)
        if (part[k] == NULL)
            return err_set_slug(err, ERR_INVALID, NULL, part_names[k],
                                "the form has no part `%s` (curl -F purpose=fine-tune -F "
                                "file=@train.jsonl)", part_names[k]);
    for (int k = P_PURPOSE; k < P_COUNT; k++)
        if (part[k] != NULL && strlen(part[k]->value) != part[k]->len)
            return err_set_slug(err, ERR_INVALID, NULL, part_names[k], "`%s` must not contain NUL",
                                part_names[k]);
    return ERR_OK;
}

static int check_purpose(const char *purpose, struct err *err)
{
    static const char *const known[] = { "assistants", "batch", "vision", "user_data" };
    if (strcmp(purpose, "fine-tune") == 0 || strcmp(purpose, "evals") == 0)
        return ERR_OK;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i], purpose) == 0)
            return err_set_slug(err, ERR_INVALID, NULL, "purpose",
                                "files of purpose \"%s\" are not kept here: it must be fine-tune or "
                                "evals", purpose);
    return err_set_slug(err, ERR_INVALID, NULL, "purpose",
                        "`purpose` must be fine-tune or evals, not \"%.40s\"", purpose);
}

/* Seconds from now, or 0: never. */
static int read_expiry(const struct api_part *anchor, const struct api_part *seconds, long *ret,
                       struct err *err)
{
    *ret = 0;
    if (anchor != NULL && strcmp(anchor->value, "created_at") != 0)
        return err_set_slug(err, ERR_INVALID, NULL, part_names[P_ANCHOR],
                            "`%s` must be created_at, not \"%.40s\"", part_names[P_ANCHOR],
                            anchor->value);
    if ((anchor != NULL) != (seconds != NULL))
        return err_set_slug(err, ERR_INVALID, NULL, "expires_after",
                            "`expires_after` needs both anchor and seconds");
    if (seconds == NULL)
        return ERR_OK;
    char *end;
    const long n = strtol(seconds->value, &end, 10);
    if (seconds->value[0] == '\0' || *end != '\0' || n < EXPIRES_MIN || n > EXPIRES_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, part_names[P_SECONDS],
                            "`%s` must be an integer from %d to %d, not \"%.40s\"",
                            part_names[P_SECONDS], EXPIRES_MIN, EXPIRES_MAX, seconds->value);
    *ret = n;
    return ERR_OK;
}

/* What is behind the last slash of either kind; text without control characters. */
static int read_name(const struct api_part *part, const char **ret, struct err *err)
{
    const char *name = part->filename != NULL ? part->filename : "file";
    for (const char *p = name; *p != '\0'; p++)
        if ((*p == '/' || *p == '\\') && p[1] != '\0')
            name = p + 1;
    json_t *valid = json_string(name); /* UTF-8? */
    bool good = valid != NULL && name[0] != '\0';
    json_decref(valid);
    for (const char *p = name; *p != '\0'; p++)
        good = good && (unsigned char)*p >= 0x20 && *p != 0x7f;
    if (!good || strlen(name) > STORE_FILE_NAME_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, "file", "the file's name must be UTF-8 of 1 to "
                            "%d bytes without control characters", STORE_FILE_NAME_MAX);
    *ret = name;
    return ERR_OK;
}

/* Every bad line by its number, as many as a sentence holds. */
static int refuse_lines(const struct dataset_report *rep, struct err *err)
{
    char list[400] = "";
    size_t n = 0;
    for (size_t i = 0; i < rep->nbad && i < LINES_SHOWN && n < sizeof list; i++) {
        const int k = snprintf(list + n, sizeof list - n, "%sline %llu: %.150s", i ? "; " : "",
                               (unsigned long long)rep->bad[i].line, rep->bad[i].why);
        if (k < 0 || n + (size_t)k >= sizeof list) { /* not a half one, unless it is the only one */
            if (i > 0)
                list[n] = '\0';
            break;
        }
        n += (size_t)k;
    }
    if (rep->bad_lines == 1)
        return err_set_slug(err, ERR_INVALID, "invalid_file_format", "file", "%s", list);
    return err_set_slug(err, ERR_INVALID, "invalid_file_format", "file",
                        "%llu of %llu lines are unusable: %s",
                        (unsigned long long)rep->bad_lines, (unsigned long long)rep->lines, list);
}

static int check_lines(const void *data, size_t len, struct err *err)
{
    struct dataset *d;
    struct dataset_report rep = { 0 };
    struct err why = { 0 };
    int rc = dataset_open(NULL, NULL, &d, err);
    if (rc != ERR_OK)
        return rc;
    rc = dataset_feed(d, data, len, err);
    if (rc != ERR_OK) {
        dataset_abort(d);
        return rc;
    }
    rc = dataset_end(d, &rep, NULL, &why);
    if (rc != ERR_OK && rep.nbad > 0)
        rc = refuse_lines(&rep, err);
    else if (rc == ERR_INVALID)
        rc = err_set_slug(err, rc, "invalid_file_format", "file", "%s", why.msg);
    else if (rc != ERR_OK)
        rc = err_set(err, rc, "%s", why.msg);
    dataset_report_free(&rep);
    return rc;
}

int files_create(struct api_ctx *c, struct err *err)
{
    const struct api_part *part[P_COUNT] = { NULL };
    const char *name = NULL;
    long seconds = 0;
    int rc = sort_parts(c->req, part, err);
    if (rc != ERR_OK || part[P_FILE] == NULL || part[P_PURPOSE] == NULL)
        return rc;
    const char *purpose = part[P_PURPOSE]->value;
    rc = check_purpose(purpose, err);
    if (rc == ERR_OK)
        rc = read_expiry(part[P_ANCHOR], part[P_SECONDS], &seconds, err);
    if (rc == ERR_OK)
        rc = read_name(part[P_FILE], &name, err);
    if (rc == ERR_OK && spool_size(part[P_FILE]->spool) > c->api->o.max_file_bytes) {
        char limit[32];
        rc = err_set_slug(err, ERR_TOO_LARGE, NULL, "file", "the file is larger than %s (lorad serve "
                          "--max-file)", human_bytes(c->api->o.max_file_bytes, limit));
    }
    if (rc == ERR_OK)
        rc = store_files_clean(c->st, err);
    void *map = NULL;
    size_t len = 0;
    if (rc == ERR_OK)
        rc = spool_map(part[P_FILE]->spool, "file", "the file is empty", &map, &len, err);
    if (rc != ERR_OK)
        return rc;
    struct store_file f = { 0 };
    rc = check_lines(map, len, err);
    if (rc == ERR_OK)
        rc = store_file_add(c->st, c->plan->tenant, name, purpose, map, len,
                            seconds > 0 ? now_unix_ms() + seconds * 1000 : 0, &f, err);
    munmap(map, len);
    return rc != ERR_OK ? rc : resp_json(c, 200, file_json(&f), err);
}

/* --- the rest -------------------------------------------------------------------------------- */

/* GET /v1/files?purpose=&after=&limit=&order=asc|desc */
int files_list(struct api_ctx *c, struct err *err)
{
    long limit = 10000;
    const char *order = c->req->query(c->req->ud, "order");
    const bool oldest_first = order != NULL && strcmp(order, "asc") == 0;
    int rc = query_int(c, "limit", 1, 10000, &limit, err);
    if (rc == ERR_OK && order != NULL && !oldest_first && strcmp(order, "desc") != 0)
        rc = err_set_slug(err, ERR_INVALID, NULL, "order",
                          "`order` must be asc or desc, not \"%.40s\"", order);
    if (rc != ERR_OK)
        return rc;
    char purpose[64] = "", after[64] = ""; /* what query() gives is good until the next */
    const char *v = c->req->query(c->req->ud, "purpose");
    const bool all = v == NULL;
    snprintf(purpose, sizeof purpose, "%s", all ? "" : v);
    v = c->req->query(c->req->ud, "after");
    snprintf(after, sizeof after, "%s", v != NULL ? v : "");
    struct store_file *f = NULL;
    size_t n = 0;
    rc = store_file_list(c->st, c->plan->tenant, all ? NULL : purpose, v != NULL ? after : NULL,
                         (int)limit + 1, oldest_first, &f, &n, err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n && i < (size_t)limit; i++)
        if (json_array_append_new(data, file_json(&f[i])) != 0)
            rc = err_nomem(err);
    free(f);
    if (rc != ERR_OK) {
        json_decref(data);
        return rc;
    }
    return respond_list(c, data, n > (size_t)limit, err);
}

/* GET /v1/files/{ref} */
int files_show(struct api_ctx *c, struct err *err)
{
    struct store_file f;
    int rc = store_file_get(c->st, c->plan->tenant, c->plan->arg, &f, err);
    return rc != ERR_OK ? rc : resp_json(c, 200, file_json(&f), err);
}

/* The name with what a header cannot hold replaced. */
static void header_name(const char *name, char ret[128])
{
    const size_t n = strnlen(name, 127);
    memcpy(ret, name, n);
    ret[n] = '\0';
    for (char *p = ret; *p != '\0'; p++)
        if (*p < 0x20 || *p > 0x7e || *p == '"' || *p == '\\')
            *p = '_';
}

/* GET /v1/files/{ref}/content: through a file of the spool, so that a slow reader keeps nothing in
 * memory and no transaction open. */
int files_content(struct api_ctx *c, struct err *err)
{
    struct store_file f;
    struct spool *s = NULL;
    char name[128];
    int rc = store_file_get(c->st, c->plan->tenant, c->plan->arg, &f, err);
    if (rc == ERR_OK)
        rc = spool_open(c->api->o.db_path, (size_t)f.bytes, &s, err);
    if (rc == ERR_OK)
        rc = store_file_read(c->st, c->plan->tenant, f.ref, s, err);
    if (rc != ERR_OK) {
        spool_close(s);
        return rc;
    }
    c->resp->status = 200;
    c->resp->type = "application/octet-stream";
    c->resp->file = s;
    header_name(f.name, name);
    api_resp_header(c->resp, "Content-Disposition", "attachment; filename=\"%s\"", name);
    return ERR_OK;
}

/* DELETE /v1/files/{ref} */
int files_delete(struct api_ctx *c, struct err *err)
{
    int rc = store_file_delete(c->st, c->plan->tenant, c->plan->arg, err);
    if (rc != ERR_OK)
        return rc;
    return resp_json(c, 200, json_pack("{s:s, s:s, s:b}", "id", c->plan->arg, "object", "file",
                                       "deleted", 1), err);
}
