/* hub_http.c - HTTP transfers with libcurl: several at once, redirects, ranges, tries and pauses.
 *
 * Redirects are followed here and not by libcurl, so that it can be read in one place who gets the
 * token: requests whose scheme, host and port are the endpoint's, and no other.  Nothing is ever
 * followed from https to http.
 *
 * A try that ends early is followed by another one, which asks for the rest (Range).  Tries that
 * bring bytes do not count; TRIES that bring none are the end. */
#include "server/hub_int.h"

#include "server/options.h"
#include "server/stop.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    TRIES = 6,
    REDIRECTS = 5,
    RETRY_AFTER_MAX = 120, /* seconds; a server that asks for more is taken at its word: later */
    CONNECT_SECONDS = 20,
    TEXT_MAX_NOTE = 200,
};

/* --- who gets the token ---------------------------------------------------------------------- */

/* Scheme, host and port, of a valid http(s) URL; NULL otherwise.  free() it. */
static char *origin_of(const char *url)
{
    char *scheme = NULL, *host = NULL, *port = NULL, *ret = NULL;
    CURLU *u = curl_url();
    if (u != NULL && curl_url_set(u, CURLUPART_URL, url, 0) == CURLUE_OK &&
        curl_url_get(u, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK &&
        curl_url_get(u, CURLUPART_HOST, &host, 0) == CURLUE_OK &&
        curl_url_get(u, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT) == CURLUE_OK &&
        (strcmp(scheme, "https") == 0 || strcmp(scheme, "http") == 0)) {
        for (char *p = host; *p != '\0'; p++)
            if (*p >= 'A' && *p <= 'Z')
                *p = (char)(*p - 'A' + 'a');
        if (asprintf(&ret, "%s://%s:%s", scheme, host, port) < 0)
            ret = NULL;
    }
    curl_free(scheme);
    curl_free(host);
    curl_free(port);
    curl_url_cleanup(u);
    return ret;
}

static bool same_origin(const char *a, const char *b)
{
    char *x = origin_of(a), *y = origin_of(b);
    const bool same = x != NULL && y != NULL && strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

static bool is_https(const char *url) { return strncasecmp(url, "https://", 8) == 0; }

/* --- one request -------------------------------------------------------------------------------- */

static size_t on_body(char *data, size_t one, size_t n, void *ud)
{
    struct transfer *t = ud;
    long status = 0;
    n *= one;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &status);
    if (status != 200 && status != 206)
        return n; /* a redirect's or an error's page */
    if (t->part == NULL) {
        if (buf_add(t->text, data, n) == ERR_OK)
            return n;
        err_set(&t->err, ERR_TOO_LARGE, "%s is larger than %zu bytes", t->what, t->text->max);
        return 0;
    }
    /* The server may send all of it although a part was asked for. */
    if (t->range != t->part->at && t->range == 0 && part_restart(t->part, &t->err) != ERR_OK)
        return 0;
    if (t->range != t->part->at) {
        err_set(&t->err, ERR_INVALID, "%s: the server sent another part than it was asked for",
                t->what);
        return 0;
    }
    if (part_write(t->part, data, n, &t->err) != ERR_OK)
        return 0;
    t->range += n;
    return n;
}

/* "Name: value" with the name in any case; NULL if it is another. */
static const char *header_value(const char *line, const char *name)
{
    const size_t n = strlen(name);
    if (strncasecmp(line, name, n) != 0 || line[n] != ':')
        return NULL;
    return line + n + 1 + strspn(line + n + 1, " \t");
}

static size_t on_header(char *data, size_t one, size_t n, void *ud)
{
    struct transfer *t = ud;
    char line[256];
    const char *v;
    n *= one;
    snprintf(line, sizeof line, "%.*s", (int)(n < 255 ? n : 255), data);
    if (strncmp(line, "HTTP/", 5) == 0) {
        t->range = 0;
        t->retry_after = -1;
    } else if ((v = header_value(line, "Content-Range")) != NULL && strncasecmp(v, "bytes ", 6) == 0) {
        t->range = strtoull(v + 6, NULL, 10);
    } else if ((v = header_value(line, "Retry-After")) != NULL && *v >= '0' && *v <= '9') {
        t->retry_after = strtod(v, NULL);
    }
    return n;
}

static int add_header(struct transfer *t, const char *line)
{
    struct curl_slist *l = curl_slist_append(t->headers, line);
    if (l == NULL)
        return ERR_NOMEM;
    t->headers = l;
    return ERR_OK;
}

static int request_begin(struct transfer *t, struct err *err)
{
    const char *url = t->next != NULL ? t->next : t->url;
    const struct hub *h = t->hub;
    char range[32];
    t->easy = curl_easy_init();
    if (t->easy == NULL ||
        (h->token != NULL && same_origin(url, h->endpoint) && add_header(t, h->token) != ERR_OK))
        return err_nomem(err);
    CURL *e = t->easy;
    curl_easy_setopt(e, CURLOPT_PRIVATE, t);
    curl_easy_setopt(e, CURLOPT_URL, url);
    curl_easy_setopt(e, CURLOPT_HTTPHEADER, t->headers);
    curl_easy_setopt(e, CURLOPT_PROTOCOLS_STR, is_https(h->endpoint) ? "https" : "http,https");
    curl_easy_setopt(e, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(e, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(e, CURLOPT_USERAGENT, "lorad");
    curl_easy_setopt(e, CURLOPT_CONNECTTIMEOUT, (long)CONNECT_SECONDS);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_LIMIT, 1L);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_TIME, (long)h->o->stall_seconds);
    curl_easy_setopt(e, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(e, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(e, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(e, CURLOPT_HEADERDATA, t);
    if (t->part != NULL && t->part->at > 0) {
        snprintf(range, sizeof range, "%llu-", (unsigned long long)t->part->at);
        curl_easy_setopt(e, CURLOPT_RANGE, range);
    }
    if (t->part == NULL)
        buf_free(t->text);
    t->began = t->part != NULL ? t->part->at : 0;
    t->range = 0;
    t->retry_after = -1;
    return curl_multi_add_handle(h->multi, e) == CURLM_OK ? ERR_OK : err_nomem(err);
}

static void request_end(struct transfer *t)
{
    if (t->easy != NULL) {
        curl_multi_remove_handle(t->hub->multi, t->easy);
        curl_easy_cleanup(t->easy);
    }
    curl_slist_free_all(t->headers);
    t->easy = NULL;
    t->headers = NULL;
}

/* --- what came of it -------------------------------------------------------------------------- */

static int refused(const struct transfer *t, long status, struct err *err)
{
    const struct hub *h = t->hub;
    const char *repo = h->ref->repo, *rev = h->ref->rev;
    switch (status) {
    case 401:
        return err_set(err, ERR_AUTH,
                       h->token ? "%s: the hub does not accept the token in HF_TOKEN (401)"
                                : "%s: the hub asks for a token (401): there is no such repository, or "
                                  "it is private or gated; set HF_TOKEN to a token that may read it",
                       repo);
    case 403:
        return err_set(err, ERR_FORBIDDEN,
                       "%s: access is not granted (403): accept its terms at %s/%s%s", repo,
                       h->endpoint, repo,
                       h->token ? ", or use a token that may read it" : " and set HF_TOKEN");
    case 404:
        if (t->part == NULL)
            return err_set(err, ERR_NOT_FOUND, "there is no %s with a revision %s at %s (404)", repo,
                           rev, h->endpoint);
        return err_set(err, ERR_NOT_FOUND, "%s@%s: %s is not at %s (404)", repo, rev, t->what,
                       h->endpoint);
    case 429:
        return err_set(err, ERR_BUSY,
                       "%s: the hub says that there were too many requests (429); try again later%s",
                       repo, h->token ? "" : ", or with HF_TOKEN set");
    default:
        return err_set(err, ERR_UNAVAILABLE, "%s@%s: the answer for %s was status %ld%s", repo, rev,
                       t->what, status, status >= 500 ? ": the hub is in trouble, try again later" : "");
    }
}

/* Another try after a pause, or the failure that it is. */
static int again(struct transfer *t, CURLcode rc, long status, struct err *err)
{
    const bool moved = t->part != NULL && t->part->at > t->began;
    t->tries = moved ? 0 : t->tries + 1;
    free(t->next);
    t->next = NULL;
    t->redirects = 0;
    if (t->tries >= TRIES || t->retry_after > RETRY_AFTER_MAX) {
        if (status >= 400)
            return refused(t, status, err);
        return err_set(err, ERR_UNAVAILABLE, "%s@%s: %s could not be downloaded: %s", t->hub->ref->repo,
                       t->hub->ref->rev, t->what, curl_easy_strerror(rc));
    }
    /* 0.25, 0.5, 1, ... seconds, and up to half of it more, so that several do not come at once */
    const double pause = 0.25 * (double)(1 << t->tries) * (1 + (double)(rand() % 512) / 1024);
    t->not_before = now_mono() + (t->retry_after > pause ? t->retry_after : pause);
    return ERR_OK;
}

static int redirect(struct transfer *t, struct err *err)
{
    char *to = NULL;
    curl_easy_getinfo(t->easy, CURLINFO_REDIRECT_URL, &to);
    if (to == NULL)
        return err_set(err, ERR_INVALID, "%s: a redirect leads nowhere", t->what);
    if (++t->redirects > REDIRECTS)
        return err_set(err, ERR_INVALID, "%s: more than %d redirects", t->what, REDIRECTS);
    char *origin = origin_of(to);
    const bool usable = origin != NULL && (is_https(origin) || !is_https(t->hub->endpoint));
    free(origin);
    if (!usable)
        return err_set(err, ERR_INVALID, "%s: a redirect leads to %.*s, which is not followed", t->what,
                       TEXT_MAX_NOTE, to);
    free(t->next);
    t->next = strdup(to);
    t->not_before = 0;
    return t->next == NULL ? err_nomem(err) : ERR_OK;
}

static int whole(struct transfer *t, struct err *err)
{
    bool twice = false;
    if (t->part == NULL) {
        t->done = true;
        return ERR_OK;
    }
    if (t->part->at < t->part->file->size) /* an answer that ended early without saying so */
        return again(t, CURLE_PARTIAL_FILE, 0, err);
    int rc = part_finish(t->part, &twice, err);
    t->done = rc == ERR_OK && !twice;
    t->not_before = 0;
    free(t->next);
    t->next = NULL;
    return rc;
}

static int finish(struct transfer *t, CURLcode rc, struct err *err)
{
    long status = 0;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &status);
    if (t->err.code != ERR_OK) {
        *err = t->err;
        return t->err.code;
    }
    if (rc == CURLE_OUT_OF_MEMORY)
        return err_nomem(err);
    if (rc == CURLE_UNSUPPORTED_PROTOCOL || rc == CURLE_URL_MALFORMAT)
        return err_set(err, ERR_INVALID, "%s: %s", t->what, curl_easy_strerror(rc));
    if (rc == CURLE_PEER_FAILED_VERIFICATION)
        return err_set(err, ERR_FORBIDDEN, "%s: the server's certificate is not valid: %s", t->what,
                       curl_easy_strerror(rc));
    if (rc != CURLE_OK)
        return again(t, rc, status, err);
    if (status == 200 || status == 206)
        return whole(t, err);
    if (status == 301 || status == 302 || status == 303 || status == 307 || status == 308)
        return redirect(t, err);
    if (status == 416 && t->part != NULL && t->part->at > 0) {
        int again_rc = part_restart(t->part, err);
        return again_rc == ERR_OK ? again(t, rc, status, err) : again_rc;
    }
    if (status == 408 || status == 429 || (status >= 500 && status <= 599))
        return again(t, rc, status, err);
    return refused(t, status, err);
}

/* --- all of them -------------------------------------------------------------------------------- */

static int start_some(struct hub *h, struct transfer *t, size_t n, struct err *err)
{
    int active = 0;
    for (size_t i = 0; i < n; i++)
        active += t[i].easy != NULL;
    for (size_t i = 0; i < n && active < h->o->jobs; i++) {
        if (t[i].done || t[i].easy != NULL || t[i].not_before > now_mono())
            continue;
        /* Part and list may be complete already, from a run that was stopped before its end. */
        int rc = t[i].part != NULL && t[i].part->at == t[i].part->file->size
                     ? whole(&t[i], err)
                     : request_begin(&t[i], err);
        if (rc != ERR_OK)
            return rc;
        active += t[i].easy != NULL;
    }
    return ERR_OK;
}

static int take_finished(struct hub *h, struct err *err)
{
    CURLMsg *m;
    int left;
    while ((m = curl_multi_info_read(h->multi, &left)) != NULL) {
        struct transfer *t = NULL;
        const CURLcode result = m->data.result;
        if (m->msg != CURLMSG_DONE)
            continue;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&t);
        int rc = finish(t, result, err);
        request_end(t);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

static bool all_done(const struct transfer *t, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!t[i].done)
            return false;
    return true;
}

static void show(const struct transfer *t, size_t n, const char *label)
{
    uint64_t at = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        at += t[i].part != NULL ? t[i].part->at : 0;
        size += t[i].part != NULL ? t[i].part->file->size : 0;
    }
    if (size > 0)
        progress(label, at < size || all_done(t, n) ? at : size - 1, size);
}

int hub_run(struct hub *h, struct transfer *t, size_t n, const char *label, struct err *err)
{
    int rc = ERR_OK, running;
    for (size_t i = 0; i < n; i++)
        t[i].hub = h;
    while (rc == ERR_OK && !all_done(t, n)) {
        rc = start_some(h, t, n, err);
        if (rc == ERR_OK && curl_multi_perform(h->multi, &running) != CURLM_OK)
            rc = err_nomem(err);
        if (rc == ERR_OK)
            rc = take_finished(h, err);
        if (rc == ERR_OK && stop_asked())
            rc = err_set(err, ERR_CANCELLED, "stopped: the same command goes on where this one ended");
        if (rc == ERR_OK && !all_done(t, n))
            curl_multi_poll(h->multi, NULL, 0, 100, NULL);
        show(t, n, label);
    }
    for (size_t i = 0; i < n; i++) {
        request_end(&t[i]);
        free(t[i].next);
        t[i].next = NULL;
    }
    return rc;
}

/* --- open and close -------------------------------------------------------------------------------- */

/* A line break in the token would be a header of its own. */
static int make_token(struct hub *h, struct err *err)
{
    const char *token = getenv("HF_TOKEN");
    if (token == NULL || token[0] == '\0')
        return ERR_OK;
    for (const char *p = token; *p != '\0'; p++)
        if (*p <= ' ' || *p >= 0x7f)
            return err_set(err, ERR_INVALID, "HF_TOKEN has characters that no token has");
    if (asprintf(&h->token, "Authorization: Bearer %s", token) >= 0)
        return ERR_OK;
    h->token = NULL;
    return err_nomem(err);
}

int hub_open(struct hub *h, const struct hub_opts *o, const struct hub_ref *ref, struct err *err)
{
    const char *env = getenv("HF_ENDPOINT");
    const char *endpoint = o->endpoint ? o->endpoint
                           : env != NULL && env[0] != '\0' ? env : "https://huggingface.co";
    *h = (struct hub){ .o = o, .ref = ref };
    h->endpoint = strdup(endpoint);
    if (h->endpoint == NULL || curl_global_init(CURL_GLOBAL_DEFAULT) != 0 ||
        (h->multi = curl_multi_init()) == NULL)
        return err_nomem(err);
    for (size_t n = strlen(h->endpoint); n > 0 && h->endpoint[n - 1] == '/'; n--)
        h->endpoint[n - 1] = '\0';
    char *origin = origin_of(h->endpoint);
    const bool good = origin != NULL;
    free(origin);
    if (!good)
        return err_set(err, ERR_INVALID, "the endpoint %.100s is not an http or https address",
                       endpoint);
    return make_token(h, err);
}

void hub_close(struct hub *h)
{
    if (h->multi != NULL)
        curl_multi_cleanup(h->multi);
    free(h->endpoint);
    free(h->token);
    *h = (struct hub){ 0 };
}
