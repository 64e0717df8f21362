/* jinja.h - chat templates: a Jinja interpreter, JSON values in, text out.
 *
 * It gives what Python's Jinja2 gives as Hugging Face's transformers sets it up for chat templates:
 * an immutable sandbox, trim_blocks and lstrip_blocks, break and continue, raise_exception(),
 * strftime_now(), a tojson that is json.dumps(ensure_ascii=False), {% generation %} blocks.  What a
 * chat template cannot have there either (include, import, extends) is refused when it is parsed.
 * Where Python has more than we do (integers beyond 64 bits, a few filters), the template fails
 * with a sentence; it never gives other text.
 *
 * A template is hostile, and so is what it renders: steps, nesting, memory and output are bounded,
 * and running out of one is an error like any other.
 *
 * A `struct jinja` is immutable after jinja_parse(); any thread may render it at once. */
#ifndef ENGINE_JINJA_H
#define ENGINE_JINJA_H

#include "engine/err.h"
#include "engine/util.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

struct jinja;

/* `name` is what messages call the template; text and name are copied.  ERR_INVALID with name, line
 * and reason for a text that is no template, or that uses what there is not. */
int jinja_parse(const char *name, const char *text, size_t len, struct jinja **ret,
                struct err *err);
void jinja_free(struct jinja *t); /* NULL is fine */

/* Zero means the default. */
struct jinja_opts {
    int64_t now;     /* unix seconds for strftime_now(), in the local time zone; 0: the clock */
    int64_t steps;   /* nodes evaluated and items or short pieces of text touched; 20 million */
    int64_t *left;   /* if not NULL, used instead of `steps`: what is taken is subtracted, so that
                      * several renderings can share it; 0 allows none */
    size_t memory;   /* bytes that values may take; 256 MiB */
    size_t output;   /* bytes of text; 64 MiB */
};

/* Appends the text to `ret`, which is unchanged after a failure.  `vars` is an object: the
 * template's variables.  ERR_INVALID for what the template does wrong (for raise_exception() the
 * message is the template's own words, slug "template_exception"), ERR_TOO_LARGE for a limit. */
int jinja_render(const struct jinja *t, const json_t *vars, const struct jinja_opts *o,
                 struct buf *ret, struct err *err);

#endif
