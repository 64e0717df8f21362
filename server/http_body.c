/* http_body.c - gathering a request's body: in memory, in a spool file, or as a form's parts.
 *
 * Runs on libmicrohttpd's threads.  A body that turns out to be no good is still read to its end
 * (within SWALLOW_MAX past the limit), because libmicrohttpd takes an answer only before the body
 * or after it; body_err remembers why. */
#include "server/http_int.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool refuse(struct request *r)
{
    api_resp_error(&r->resp, &r->body_err);
    return false;
}

static void too_large(struct request *r)
{
    char limit[32];
    const char *option = r->plan.max_option;
    err_set(&r->body_err, ERR_TOO_LARGE, "the body is larger than the %s that are accepted here%s%s%s",
            human_bytes(r->plan.max_body, limit), option ? " (lorad serve " : "",
            option ? option : "", option ? ")" : "");
}

/* Uploads take disk, so only so many gather at once. */
static bool take_upload_slot(struct request *r)
{
    struct http *h = r->h;
    pthread_mutex_lock(&h->lock);
    r->uploading = h->uploads < h->o.max_uploads;
    h->uploads += r->uploading;
    pthread_mutex_unlock(&h->lock);
    if (!r->uploading)
        err_set(&r->body_err, ERR_BUSY, "%d uploads are under way, which is the limit: try again "
                "when one has finished", h->o.max_uploads);
    return r->uploading;
}

/* A field of the form is complete or a new one begins: where its bytes go. */
static struct api_part *part_at(struct request *r, const char *name, const char *filename,
                                bool begins)
{
    if (!begins)
        return r->nparts > 0 ? &r->parts[r->nparts - 1] : NULL;
    if (r->nparts == API_PARTS_MAX) {
        err_set(&r->body_err, ERR_INVALID, "the form has more than %d parts", API_PARTS_MAX);
        return NULL;
    }
    struct api_part *p = &r->parts[r->nparts];
    *p = (struct api_part){ .name = strdup(name ? name : ""), .value = NULL };
    if (filename != NULL && (p->filename = strdup(filename)) == NULL) {
        free(p->name);
        err_nomem(&r->body_err);
        return NULL;
    }
    const bool file = r->plan.spool_part != NULL && strcmp(p->name, r->plan.spool_part) == 0;
    if (p->name == NULL || (!file && (p->value = calloc(1, 1)) == NULL)) {
        free(p->name);
        free(p->filename);
        err_nomem(&r->body_err);
        return NULL;
    }
    if (file && spool_open(r->h->o.db_path, r->plan.max_body, &p->spool, &r->body_err) != ERR_OK) {
        free(p->name);
        free(p->filename);
        return NULL;
    }
    r->nparts++;
    return p;
}

static enum MHD_Result on_part(void *ud, enum MHD_ValueKind kind, const char *name,
                               const char *filename, const char *type, const char *encoding,
                               const char *data, uint64_t off, size_t len)
{
    (void)kind;
    (void)type;
    (void)encoding;
    struct request *r = ud;
    struct api_part *p = part_at(r, name, filename, off == 0);
    if (p == NULL || r->body_err.code != ERR_OK)
        return MHD_NO;
    if (p->spool != NULL)
        return spool_write(p->spool, data, len, &r->body_err) == ERR_OK ? MHD_YES : MHD_NO;
    if (len > API_PART_BYTES - p->len) {
        err_set(&r->body_err, ERR_TOO_LARGE, "the form's part `%.80s` has more than %d bytes",
                p->name, API_PART_BYTES);
        return MHD_NO;
    }
    char *more = realloc(p->value, p->len + len + 1);
    if (more == NULL) {
        err_nomem(&r->body_err);
        return MHD_NO;
    }
    memcpy(more + p->len, data, len);
    p->len += len;
    more[p->len] = '\0';
    p->value = more;
    return MHD_YES;
}

/* --- the end of a form --------------------------------------------------------------------- */
/* What follows the last boundary is nobody's (RFC 2046 calls it the epilogue; some clients send an
 * empty line there), but libmicrohttpd takes it for an error.  So it does not get to see it. */
static void form_end_init(struct request *r)
{
    struct form_end *e = &r->form_end;
    const char *type = MHD_lookup_connection_value(r->c, MHD_HEADER_KIND, "Content-Type");
    const char *b = type != NULL ? strcasestr(type, "boundary=") : NULL;
    if (b == NULL)
        return;
    b += strlen("boundary=");
    const bool quoted = *b == '"';
    b += quoted;
    const size_t n = strcspn(b, quoted ? "\"" : ";, \t");
    if (n == 0 || n > BOUNDARY_MAX)
        return;
    memcpy(e->mark, "\r\n--", 4);
    memcpy(e->mark + 4, b, n);
    memcpy(e->mark + 4 + n, "--", 2);
    e->len = n + 6;
    for (size_t i = 1, k = 0; i < e->len; i++) { /* Knuth, Morris, Pratt */
        while (k > 0 && e->mark[i] != e->mark[k])
            k = e->back[k - 1];
        k += e->mark[i] == e->mark[k];
        e->back[i] = (uint8_t)k;
    }
    e->at = 2; /* the body begins a line */
}

/* How many of these bytes belong to the form. */
static size_t form_part(struct form_end *e, const char *data, size_t len)
{
    if (e->len == 0)
        return len;
    for (size_t i = 0; i < len && !e->over; i++) {
        while (e->at > 0 && data[i] != e->mark[e->at])
            e->at = e->back[e->at - 1];
        e->at += data[i] == e->mark[e->at];
        e->over = e->at == e->len;
        if (e->over)
            return i + 1;
    }
    return e->over ? 0 : len;
}

bool body_begin(struct request *r)
{
    const struct api_plan *p = &r->plan;
    if (r->content_length > p->max_body) {
        too_large(r);
        return refuse(r);
    }
    switch (p->body) {
    case API_BODY_JSON:
        buf_init(&r->body, p->max_body);
        return true;
    case API_BODY_SPOOL:
        if (!take_upload_slot(r) ||
            spool_open(r->h->o.db_path, p->max_body, &r->req.upload, &r->body_err) != ERR_OK)
            return refuse(r);
        return true;
    case API_BODY_FORM:
        if (!take_upload_slot(r))
            return refuse(r);
        r->parts = calloc(API_PARTS_MAX, sizeof *r->parts);
        r->form = MHD_create_post_processor(r->c, 16 << 10, on_part, r);
        form_end_init(r);
        if (r->parts == NULL)
            err_nomem(&r->body_err);
        else if (r->form == NULL)
            err_set(&r->body_err, ERR_INVALID, "the Content-Type of the form has no usable "
                    "boundary");
        return r->body_err.code == ERR_OK || refuse(r);
    default:
        return true;
    }
}

void body_add(struct request *r, const char *data, size_t len)
{
    r->received += len;
    if (r->body_err.code != ERR_OK)
        return;
    if (r->received > r->plan.max_body) {
        too_large(r);
        return;
    }
    switch (r->plan.body) {
    case API_BODY_JSON:
        if (buf_add(&r->body, data, len) != ERR_OK)
            err_nomem(&r->body_err);
        break;
    case API_BODY_SPOOL:
        spool_write(r->req.upload, data, len, &r->body_err);
        break;
    case API_BODY_FORM:
        len = form_part(&r->form_end, data, len);
        if (len > 0 && MHD_post_process(r->form, data, len) != MHD_YES)
            err_set(&r->body_err, ERR_INVALID, "the form is not valid multipart/form-data");
        break;
    default:
        break;
    }
}

bool body_end(struct request *r)
{
    if (r->form != NULL) {
        const enum MHD_Result whole = MHD_destroy_post_processor(r->form);
        r->form = NULL;
        if (whole != MHD_YES)
            err_set(&r->body_err, ERR_INVALID, "the form ends in the middle of a part");
    }
    if (r->body_err.code != ERR_OK)
        return refuse(r);
    r->req.body = r->body.data;
    r->req.body_len = r->body.len;
    r->req.parts = r->parts;
    r->req.nparts = r->nparts;
    return true;
}

void body_free(struct request *r)
{
    MHD_destroy_post_processor(r->form);
    for (size_t i = 0; i < r->nparts; i++) {
        free(r->parts[i].name);
        free(r->parts[i].filename);
        free(r->parts[i].value);
        spool_close(r->parts[i].spool);
    }
    free(r->parts);
    spool_close(r->req.upload);
    buf_free(&r->body);
}
