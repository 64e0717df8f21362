/* web.c - the web page, compiled in.
 *
 * It needs no key (it asks for one) and holds no secret.  The policy lets it load its own script
 * and style and talk to this server, nothing else; nobody may frame it. */
#include "api/api_int.h"
#include "api/web.h"

#include <string.h>

static const char policy[] =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

static const struct web_file *find(const char *path)
{
    if (path[0] != '/')
        return NULL;
    const char *name = path[1] == '\0' ? "index.html" : path + 1;
    for (const struct web_file *f = web_files; f->path != NULL; f++)
        if (strcmp(f->path, name) == 0)
            return f;
    return NULL;
}

bool web_has(const char *path) { return find(path) != NULL; }

int web_page(struct api_ctx *c, struct err *err)
{
    const struct web_file *f = find(c->req->path);
    if (f == NULL)
        return err_set(err, ERR_NOT_FOUND, "there is no page %.200s", c->req->path);
    uint8_t hash[32];
    char hex[65], etag[20];
    sha256_of(f->data, f->len, hash);
    hex32(hash, hex);
    etag[0] = '"';
    memcpy(etag + 1, hex, 16);
    memcpy(etag + 17, "\"", 2);

    struct api_resp *r = c->resp;
    r->type = f->type;
    api_resp_header(r, "ETag", "%s", etag);
    api_resp_header(r, "Cache-Control", "no-cache"); /* keep it, but ask each time */
    api_resp_header(r, "Content-Security-Policy", "%s", policy);
    api_resp_header(r, "X-Content-Type-Options", "nosniff");
    api_resp_header(r, "Referrer-Policy", "no-referrer");
    const char *have = c->req->header(c->req->ud, "If-None-Match");
    if (have != NULL && strstr(have, etag) != NULL) {
        r->status = 304;
        return ERR_OK;
    }
    r->status = 200;
    r->static_body = f->data;
    r->body_len = f->len;
    return ERR_OK;
}
