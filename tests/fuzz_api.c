/* fuzz_api.c - whole requests against the demo base, without sockets and without generating.
 *
 * Input: "METHOD PATH?QUERY", header lines, an empty line, the body.  Parts of a form are separated by
 * "%%%%" and are a name, a line feed, the value.  The scheduler is drained, so that generations run
 * up to their submission and are refused there.  No request may make the server say 500. */
#include "tests/fuzz.h"
#include "tests/support_serve.h"

#include <strings.h>

static const char mark[] = "%%%%";

struct asked {
    char *method, *path, *query; /* query may be NULL */
    char *headers[8];
    int nheaders;
    char value[256];
};

static const char *header(void *ud, const char *key)
{
    const struct asked *a = ud;
    const size_t n = strlen(key);
    for (int i = 0; i < a->nheaders; i++)
        if (strncasecmp(a->headers[i], key, n) == 0 && a->headers[i][n] == ':')
            return a->headers[i] + n + 1 + strspn(a->headers[i] + n + 1, " ");
    return NULL;
}

static const char *query(void *ud, const char *key)
{
    struct asked *a = ud;
    const size_t n = strlen(key);
    for (const char *p = a->query; p != NULL && *p != '\0'; p += strcspn(p, "&"), p += *p == '&')
        if (strncmp(p, key, n) == 0 && p[n] == '=') {
            snprintf(a->value, sizeof a->value, "%.*s", (int)strcspn(p + n + 1, "&"), p + n + 1);
            return a->value;
        }
    return NULL;
}

static void query_each(void *ud, bool (*fn)(void *fn_ud, const char *key, const char *value),
                       void *fn_ud)
{
    struct asked *a = ud;
    for (const char *p = a->query; p != NULL && *p != '\0'; p += strcspn(p, "&"), p += *p == '&') {
        const size_t all = strcspn(p, "&"), n = strcspn(p, "=&");
        char *key = fuzz_text(p, n), *value = fuzz_text(p + n, n < all ? all - n : 0);
        const bool more = fn(fn_ud, key, value[0] == '=' ? value + 1 : value);
        free(key);
        free(value);
        if (!more)
            return;
    }
}

static void wake(void *ud) { (void)ud; }

static struct serve *server(void)
{
    static struct serve *s;
    if (s == NULL) {
        s = serve_open(NULL);
        serve_add_adapter(s, 1, "whitman", DEMO_ADAPTER("whitman"));
        sched_drain(s->sched, 0);
    }
    return s;
}

static void parse_head(char *head, struct asked *a)
{
    char *save = NULL;
    a->method = strtok_r(head, "\n", &save);
    for (char *s; a->nheaders < 8 && (s = strtok_r(NULL, "\n", &save)) != NULL;)
        a->headers[a->nheaders++] = s;
    if (a->method == NULL)
        a->method = head;
    a->path = strchr(a->method, ' ');
    if (a->path != NULL)
        *a->path++ = '\0';
    else
        a->path = "/v1/completions";
    a->query = strchr(a->path, '?');
    if (a->query != NULL)
        *a->query++ = '\0';
}

static struct spool *spool_of(const struct serve *s, const char *data, size_t len, size_t max)
{
    struct spool *sp = NULL;
    struct err err = { 0 };
    law(spool_open(s->db_path, max, &sp, &err) == ERR_OK &&
            spool_write(sp, data, len, &err) == ERR_OK, "a spool takes the body");
    return sp;
}

static size_t parse_parts(const struct serve *s, const struct api_plan *plan, const char *body,
                          size_t len, struct api_part parts[API_PARTS_MAX])
{
    size_t n = 0;
    for (const char *end = body + len; n < API_PARTS_MAX && body < end; n++) {
        const char *stop = memmem(body, (size_t)(end - body), mark, 4);
        const char *next = stop != NULL ? stop + 4 : end;
        stop = stop != NULL ? stop : end;
        const char *line = memchr(body, '\n', (size_t)(stop - body));
        const char *name_end = line != NULL ? line : stop, *value = line != NULL ? line + 1 : stop;
        struct api_part *p = &parts[n];
        *p = (struct api_part){ .name = fuzz_text(body, (size_t)(name_end - body)) };
        if (plan->spool_part != NULL && strcmp(p->name, plan->spool_part) == 0) {
            p->spool = spool_of(s, value, (size_t)(stop - value), plan->max_body);
        } else {
            p->len = (size_t)(stop - value);
            p->value = fuzz_text(value, p->len);
        }
        body = next;
    }
    return n;
}

static void check(const struct api_resp *r)
{
    law(r->status >= 200 && r->status < 600 && r->status != 500, "no request is the server's fault");
    if (r->status >= 400 && r->body != NULL) {
        json_t *j = json_loadb(r->body, r->body_len, 0, NULL);
        law(j != NULL, "an error is JSON");
        json_decref(j);
    }
}

static void dispatch(struct serve *s, const struct api_plan *plan, struct api_req *q,
                     struct api_resp *resp)
{
    struct api_part parts[API_PARTS_MAX];
    struct api_call *call = NULL;
    const char *body = q->body;
    const size_t len = q->body_len;
    if (plan->body != API_BODY_JSON)
        q->body = NULL, q->body_len = 0;
    if (plan->body == API_BODY_SPOOL)
        q->upload = spool_of(s, body, len, plan->max_body);
    if (plan->body == API_BODY_FORM) {
        q->nparts = parse_parts(s, plan, body, len, parts);
        q->parts = parts;
    }
    if (!api_dispatch(s->api, s->db, plan, q, wake, NULL, resp, &call))
        api_abandon(call);
    else
        check(resp);
    for (size_t i = 0; i < q->nparts; i++) {
        free(parts[i].name);
        free(parts[i].value);
        spool_close(parts[i].spool);
    }
    spool_close(q->upload);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct serve *s = server();
    const uint8_t *blank = memmem(data, len, "\n\n", 2);
    const size_t nhead = blank != NULL ? (size_t)(blank - data) : len;
    const size_t nbody = blank != NULL ? len - nhead - 2 : 0;
    char *head = fuzz_text(data, nhead), *body = fuzz_text(data + len - nbody, nbody);
    struct asked a = { 0 };
    parse_head(head, &a);
    struct api_req q = { .method = a.method, .path = a.path, .query = query,
                         .query_each = query_each, .header = header,
                         .ud = &a, .body = body, .body_len = nbody };
    struct api_plan plan;
    struct api_resp resp = { 0 };
    if (api_begin(s->api, s->db, &q, &plan, &resp))
        dispatch(s, &plan, &q, &resp);
    else
        check(&resp);
    api_resp_free(&resp);
    free(head);
    free(body);
    return 0;
}
