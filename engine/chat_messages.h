/* chat_messages.h - OpenAI's messages: what every template relies on, and the form of a conversation
 * without a template.
 *
 * Shared by serving and by reading training data.  Messages of failures name the message at fault;
 * their err.param is "messages". */
#ifndef ENGINE_CHAT_MESSAGES_H
#define ENGINE_CHAT_MESSAGES_H

#include "engine/err.h"
#include "engine/util.h"

#include <jansson.h>

/* Each element of the array is an object with a role; content is a string, text parts or absent. */
int chat_messages_check(const json_t *messages, struct err *err);

/* The first n messages as plain lines, appended to `ret`:
 * "User: ...\nAssistant: ...\nAssistant:"; system messages stand without a name.  ERR_INVALID for
 * what lines cannot say. */
int chat_lines_render(const json_t *messages, size_t n, struct buf *ret, struct err *err);
#define CHAT_LINES_STOP "\nUser:" /* ends an answer */

/* The text of a message's content, appended. */
int chat_content_text(const json_t *content, size_t i, struct buf *ret, struct err *err);

#endif
