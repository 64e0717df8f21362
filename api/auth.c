/* auth.c - who asks: keys, and what stands in for them on a server that has none.
 *
 * With keys in the database every route that is not public needs one.  Without any, a server that
 * only this machine can reach lets everybody in as tenant `default`; then the danger is a web page
 * in the user's own browser.  Two checks keep it out: the Host header must name this machine (a
 * foreign name that resolves to 127.0.0.1 is DNS rebinding), and a request that changes something
 * must not come from a page of another origin. */
#include "api/api_int.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

/* The file is asked again only after somebody else wrote to it. */
static int have_keys(struct api_db *db, bool *ret, struct err *err)
{
    int64_t version, n;
    int rc = store_data_version(db->st, &version, err);
    if (rc != ERR_OK)
        return rc;
    if (!db->known || version != db->version) {
        rc = store_key_count(db->st, &n, err);
        if (rc != ERR_OK)
            return rc;
        db->keys = n > 0;
        db->version = version;
        db->known = true;
    }
    /* Revoking the last key must not open a server that runs. */
    if (db->keys)
        atomic_store(&db->api->keys_seen, true);
    *ret = atomic_load(&db->api->keys_seen);
    return ERR_OK;
}

/* "Authorization: Bearer KEY", or "x-api-key: KEY"; NULL if there is neither. */
static const char *shown_key(const struct api_req *req)
{
    const char *v = req->header(req->ud, "Authorization");
    if (v == NULL)
        return req->header(req->ud, "x-api-key");
    if (strncasecmp(v, "Bearer", 6) != 0 || (v[6] != ' ' && v[6] != '\t'))
        return "";
    v += 6;
    return v + strspn(v, " \t");
}

static int check_key(struct api_db *db, const struct api_req *req, struct api_plan *plan,
                     struct err *err)
{
    const char *key = shown_key(req);
    if (key == NULL)
        return err_set(err, ERR_AUTH, "this server needs a key: send the header "
                       "\"Authorization: Bearer lorad_...\"");
    struct store_key k;
    struct err why = { 0 };
    int rc = store_key_check(db->st, key, &k, &why);
    if (rc == ERR_AUTH) /* one wording, whatever is wrong with it */
        return err_set(err, ERR_AUTH, "this key is not known here or was revoked; "
                       "`lorad key list` shows the valid ones");
    if (rc != ERR_OK) {
        *err = why;
        return rc;
    }
    plan->tenant = k.tenant;
    plan->key_id = k.id;
    return ERR_OK;
}

/* Is the host part of "name:port", "[v6]:port" or "name" this machine's loopback? */
static bool loopback_host(const char *host)
{
    size_t n = host[0] == '[' ? strcspn(host, "]") + 1 : strcspn(host, ":");
    if (n > strlen(host) || (host[n] != '\0' && host[n] != ':'))
        return false;
    if (n == 9 && strncasecmp(host, "localhost", 9) == 0)
        return true;
    if (n == 5 && strncmp(host, "[::1]", 5) == 0)
        return true;
    char v4[16];
    unsigned a, b, c, d;
    int end = 0;
    if (n >= sizeof v4)
        return false;
    memcpy(v4, host, n);
    v4[n] = '\0';
    return sscanf(v4, "%3u.%3u.%3u.%3u%n", &a, &b, &c, &d, &end) == 4 && (size_t)end == n &&
           a == 127 && b < 256 && c < 256 && d < 256;
}

static int check_browser(const struct api_req *req, struct err *err)
{
    const char *host = req->header(req->ud, "Host");
    if (host != NULL && !loopback_host(host))
        return err_set(err, ERR_FORBIDDEN, "without keys this server answers to localhost and "
                       "127.0.0.1 only, not to Host \"%.100s\"; `lorad key create` makes it answer "
                       "to any name", host);
    if (strcmp(req->method, "GET") == 0 || strcmp(req->method, "HEAD") == 0)
        return ERR_OK;
    const char *origin = req->header(req->ud, "Origin");
    if (origin == NULL)
        return ERR_OK;
    const char *sep = strstr(origin, "://");
    if (sep == NULL || host == NULL || strcasecmp(sep + 3, host) != 0)
        return err_set(err, ERR_FORBIDDEN, "a web page of another origin (%.100s) may not do this "
                       "on a server without keys", origin);
    return ERR_OK;
}

int auth_check(struct api *a, struct api_db *db, const struct api_req *req, bool public_route,
               struct api_plan *plan, struct err *err)
{
    bool keys = true;
    if (a->o.loopback) {
        int rc = have_keys(db, &keys, err);
        if (rc != ERR_OK)
            return rc;
    }
    plan->tenant = STORE_TENANT_DEFAULT;
    plan->key_id = 0;
    if (!keys)
        return check_browser(req, err);
    return public_route ? ERR_OK : check_key(db, req, plan, err);
}
