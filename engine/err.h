/* err.h - the error type that every folder uses.
 *
 * A function that can fail returns an ERR_ code (0 is success) and takes a
 * `struct err *` as its last parameter.  Results come back through `ret_`
 * parameters, written only on success.  The innermost function that knows what
 * went wrong writes the message; callers pass it up unchanged. */
#ifndef ENGINE_ERR_H
#define ENGINE_ERR_H

enum err_code {
    ERR_OK,
    ERR_INVALID,     /* the caller sent something unusable: HTTP 400 */
    ERR_AUTH,        /* no key, or a wrong one: 401 */
    ERR_FORBIDDEN,   /* the key may not do this: 403 */
    ERR_NOT_FOUND,   /* 404; also what another tenant's thing is */
    ERR_CONFLICT,    /* 409 */
    ERR_TOO_LARGE,   /* over a stated limit: 413 */
    ERR_BUSY,        /* a queue is full, worth retrying: 429 with Retry-After */
    ERR_UNAVAILABLE, /* starting, draining, or the disk is full: 503 */
    ERR_NOMEM,       /* 503 */
    ERR_CANCELLED,   /* whoever asked has gone */
    ERR_IO,          /* a file could not be read or written: 500 */
    ERR_DB,          /* 500; the text goes to the log, not to the client */
    ERR_INTERNAL,    /* a broken promise of our own: 500 */
};

struct err {
    enum err_code code;
    const char *slug; /* a static word for programs ("model_not_found"), or NULL */
    const char *param; /* the request field at fault, static, or NULL */
    char msg[512];    /* one sentence, no trailing newline */
};

/* Record a failure and return `code`, so that callers can write
 *     return err_set(err, ERR_NOT_FOUND, "no adapter %d", id);
 * A message that is already there is kept: the first failure is the cause.
 * `err` may be NULL when nobody wants the text. */
int err_set(struct err *err, enum err_code code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* The same with a slug and the name of the request field (either may be NULL). */
int err_set_slug(struct err *err, enum err_code code, const char *slug, const char *param,
                 const char *fmt, ...) __attribute__((format(printf, 5, 6)));

/* Analysers do not see that a failure is never 0: this tells them. */
#ifdef __clang_analyzer__
#define err_set(err, code, ...) ((err_set)((err), (code), __VA_ARGS__), (code))
#define err_set_slug(err, code, slug, param, ...)                                                \
    ((err_set_slug)((err), (code), (slug), (param), __VA_ARGS__), (code))
#endif

/* ERR_NOMEM with the usual sentence.  Inline, so that analysers see that it is never 0. */
static inline int err_nomem(struct err *err)
{
    err_set(err, ERR_NOMEM, "out of memory");
    return ERR_NOMEM;
}

/* Forget what is recorded, so that the struct can be used again. */
void err_clear(struct err *err);

#endif
