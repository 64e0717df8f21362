/* err.c - recording failures; the first one wins. */
#include "engine/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static int record(struct err *err, enum err_code code, const char *slug, const char *param,
                  const char *fmt, va_list ap)
{
    if (err == NULL)
        return code;
    if (err->code != ERR_OK)
        return err->code;
    err->code = code;
    err->slug = slug;
    err->param = param;
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    return code;
}

int(err_set)(struct err *err, enum err_code code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int rc = record(err, code, NULL, NULL, fmt, ap);
    va_end(ap);
    return rc;
}

int(err_set_slug)(struct err *err, enum err_code code, const char *slug, const char *param,
                 const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int rc = record(err, code, slug, param, fmt, ap);
    va_end(ap);
    return rc;
}

void err_clear(struct err *err) { memset(err, 0, sizeof *err); }
