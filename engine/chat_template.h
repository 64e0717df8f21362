/* chat_template.h - a conversation in, the text that the model wants out.
 *
 * A base's template (engine/jinja.h) with the names that transformers gives it: messages, tools,
 * documents, add_generation_prompt, and bos_token, eos_token and the other special
 * tokens of tokenizer_config.json.
 *
 * OpenAI's requests are fitted to what the template was written for, which is found out once, by
 * rendering small conversations when it is opened:
 *   content      an array of text parts becomes one string, unless only parts are understood
 *   arguments    of tool calls come as JSON text and become an object, unless only text works
 *   developer    becomes system, unless the template mentions it
 * A template that takes more than a million steps for those, all together, is refused.
 *
 * Immutable after chat_template_open(); any thread may render. */
#ifndef ENGINE_CHAT_TEMPLATE_H
#define ENGINE_CHAT_TEMPLATE_H

#include "engine/err.h"
#include "engine/util.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

struct chat_template;

/* `name` is for messages.  `tokenizer_config` is the text of that file, or NULL; if `text` is the
 * default of several templates in it, the one named tool_use is taken when tools are given.
 * ERR_INVALID with name and line if a template cannot be parsed; ERR_TOO_LARGE with name and
 * line for one that takes too many steps, or 64 MiB of values, 1 MiB of text or 600 levels of nesting,
 * for a conversation of a few words. */
int chat_template_open(const char *name, const char *text, const char *tokenizer_config,
                       struct chat_template **ret, struct err *err);
void chat_template_free(struct chat_template *t); /* NULL is fine */

/* `tools` (an array) and `documents` may be NULL; the members of `more` (an object or NULL) are
 * further variables.  Appends to `ret`.  ERR_INVALID when the template fails; what it says with
 * raise_exception() is the message. */
int chat_template_render(const struct chat_template *t, const json_t *messages,
                         const json_t *tools, const json_t *documents, const json_t *more,
                         struct buf *ret, struct err *err);

/* The same for training data: the first `n` messages, and no more of them. */
struct chat_turns {
    const json_t *messages; /* an array */
    size_t n;
    const json_t *tools;    /* or NULL */
    bool whole;             /* as they stand, without the beginning of an answer
                             * (add_generation_prompt false) */
    int64_t now;            /* unix seconds for strftime_now(); 0: the clock */
};
int chat_template_turns(const struct chat_template *t, const struct chat_turns *turns,
                        struct buf *ret, struct err *err);

#endif
