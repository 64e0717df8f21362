/* resp.c - answers: headers, JSON bodies, and the only place where errors become statuses. */
#include "api/api_int.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* OpenAI's `type` and `code` for each of our codes; a slug of the error replaces `code`. */
static const struct status {
    int status;
    const char *type, *code;
    bool secret;     /* the sentence is for the log */
    int retry_after; /* seconds; 0: none */
} statuses[] = {
    [ERR_INVALID] = { 400, "invalid_request_error", NULL, false, 0 },
    [ERR_AUTH] = { 401, "invalid_request_error", "invalid_api_key", false, 0 },
    [ERR_FORBIDDEN] = { 403, "permission_error", "forbidden", false, 0 },
    [ERR_NOT_FOUND] = { 404, "invalid_request_error", "not_found", false, 0 },
    [ERR_CONFLICT] = { 409, "invalid_request_error", "conflict", false, 0 },
    [ERR_TOO_LARGE] = { 413, "invalid_request_error", "too_large", false, 0 },
    [ERR_BUSY] = { 429, "rate_limit_error", "rate_limit_exceeded", false, 1 },
    [ERR_UNAVAILABLE] = { 503, "server_error", "unavailable", false, 5 },
    [ERR_NOMEM] = { 503, "server_error", "out_of_memory", false, 5 },
    [ERR_CANCELLED] = { 503, "server_error", "cancelled", false, 5 },
    [ERR_IO] = { 500, "server_error", "internal_error", true, 0 },
    [ERR_DB] = { 500, "server_error", "internal_error", true, 0 },
    [ERR_INTERNAL] = { 500, "server_error", "internal_error", true, 0 },
};

/* Statuses that no ERR_ code has. */
static const struct { const char *slug; int status; } by_slug[] = {
    { "method_not_allowed", 405 },
    { "unsupported_media_type", 415 },
    { "not_supported", 501 },
    { "deadline_exceeded", 504 },
};

static const struct status *status_of(const struct err *err)
{
    const size_t n = sizeof statuses / sizeof statuses[0];
    const size_t code = (size_t)err->code;
    return code > 0 && code < n ? &statuses[code] : &statuses[ERR_INTERNAL];
}

static json_t *str_or_null(const char *s) { return s ? json_string(s) : json_null(); }

json_t *error_json(const struct err *err)
{
    const struct status *s = status_of(err);
    const char *msg = s->secret ? "the server could not do this; its log says why" : err->msg;
    const char *code = err->slug != NULL && !s->secret ? err->slug : s->code;
    return json_pack("{s:{s:o, s:s, s:o, s:o}}", "error", "message", json_text(msg, strlen(msg)),
                     "type", s->type, "param", str_or_null(err->param), "code",
                     str_or_null(code));
}

void api_resp_error(struct api_resp *r, const struct err *err)
{
    const struct status *s = status_of(err);
    if (s->secret)
        fprintf(stderr, "lorad: %s\n", err->msg);
    int status = s->status;
    for (size_t i = 0; err->slug != NULL && i < sizeof by_slug / sizeof by_slug[0]; i++)
        if (strcmp(by_slug[i].slug, err->slug) == 0)
            status = by_slug[i].status;
    if (s->retry_after > 0)
        api_resp_header(r, "Retry-After", "%d", s->retry_after);
    if (status == 401)
        api_resp_header(r, "WWW-Authenticate", "Bearer");
    if (resp_json_to(r, status, error_json(err), NULL) != ERR_OK) {
        r->status = 503; /* no memory even for the sentence */
        r->type = "application/json";
        r->static_body = "{\"error\":{\"message\":\"out of memory\",\"type\":\"server_error\","
                         "\"param\":null,\"code\":\"out_of_memory\"}}\n";
        r->body_len = strlen(r->static_body);
    }
}

int resp_json_to(struct api_resp *r, int status, json_t *j, struct err *err)
{
    char *text = j ? json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(j);
    if (text == NULL)
        return err_nomem(err);
    const size_t len = strlen(text);
    char *line = realloc(text, len + 2); /* a newline, for terminals */
    if (line == NULL) {
        free(text);
        return err_nomem(err);
    }
    memcpy(line + len, "\n", 2);
    r->status = status;
    r->type = "application/json";
    r->body = line;
    r->body_len = len + 1;
    return ERR_OK;
}

int resp_json(struct api_ctx *c, int status, json_t *j, struct err *err)
{
    return resp_json_to(c->resp, status, j, err);
}

void api_resp_header(struct api_resp *r, const char *name, const char *fmt, ...)
{
    if (r->nheaders == API_HEADERS_MAX)
        return;
    va_list ap;
    va_start(ap, fmt);
    snprintf(r->header[r->nheaders].name, sizeof r->header[0].name, "%s", name);
    vsnprintf(r->header[r->nheaders].value, sizeof r->header[0].value, fmt, ap);
    va_end(ap);
    /* A line end would start a header of somebody else's choice. */
    for (char *p = r->header[r->nheaders].value; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    r->nheaders++;
}

void api_resp_free(struct api_resp *r)
{
    free(r->body);
    spool_close(r->file);
    if (r->stream.next != NULL)
        r->stream.close(r->stream.ud);
    *r = (struct api_resp){ 0 };
}
