/* dataset_chat.c - what of a conversation is learned: the assistant's words and what ends its turn.
 *
 * The whole conversation is rendered once.  The prompt of an answer is what serving would render for
 * the messages before it; where every prompt is the beginning of the whole, the conversation is one
 * example, and an answer begins where its prompt ends.  Otherwise each answer is an example of its
 * own: its prompt, and the conversation up to the answer.  Most templates make the second begin with
 * the first.  Some do not (a prompt that begins the reasoning, a system message that stands in the
 * last turn only): then a rendering with a marker in place of the answer shows where it lies.
 *
 * An answer ends with the first token in it that ends generation; without one, where its turn ends. */
#include "engine/dataset_int.h"

#include "engine/chat_messages.h"

#include <string.h>

#define TEXT_MAX ((size_t)1 << 30)

/* In a template the special tokens are part of the text; plain lines are text and nothing else. */
static const struct how of_template = { .add_special = false, .parse_special = true };
static const struct how of_lines = { .add_special = true, .parse_special = false };

/* The first n messages: with the beginning of an answer, or as they stand. */
static int turns(const struct reader *r, const json_t *messages, const json_t *tools, size_t n,
                 bool whole, struct buf *ret, struct err *err)
{
    const struct chat_turns t = { .messages = messages, .n = n, .tools = tools, .whole = whole,
                                  .now = r->o.now };
    buf_free(ret);
    int rc = chat_template_turns(r->m.chat, &t, ret, err);
    if (rc == ERR_OK && ret->data == NULL) /* text has a NUL at its end also if there is none */
        rc = buf_puts(ret, "") == ERR_OK ? ERR_OK : err_nomem(err);
    return rc;
}

static bool begins(const struct buf *whole, const struct buf *with)
{
    return with->len <= whole->len && (with->len == 0 || memcmp(whole->data, with->data, with->len) == 0);
}

static bool ends(const struct buf *whole, const char *with, size_t len)
{
    return len <= whole->len && memcmp(whole->data + whole->len - len, with, len) == 0;
}

/* Bytes in common, never a part of a character. */
static size_t common(const struct buf *a, const struct buf *b)
{
    size_t n = 0;
    while (n < a->len && n < b->len && a->data[n] == b->data[n])
        n++;
    while (n > 0 && n < a->len && ((unsigned char)a->data[n] & 0xc0) == 0x80)
        n--;
    return n;
}

static bool stops(const struct reader *r, int32_t id)
{
    const struct arch *a = &r->m.base->arch;
    for (int i = 0; i < a->neos; i++)
        if (a->eos[i] == id)
            return true;
    return id == r->eos;
}

/* Learns the ids from `from` on, to the first that ends generation; false if none before `to` does:
 * then it is all of them. */
static bool learn_answer(struct reader *r, size_t from, size_t to)
{
    size_t i = from;
    while (i < to && !stops(r, r->ids.ids[i]))
        i++;
    reader_learn(r, from, i < to ? i + 1 : to);
    return i < to;
}

/* --- one example of all answers ------------------------------------------------------------------- */

struct texts {
    struct buf whole, prompt, turn, other;
};

static void texts_free(struct texts *t)
{
    buf_free(&t->whole);
    buf_free(&t->prompt);
    buf_free(&t->turn);
    buf_free(&t->other);
}

/* Answer i, which begins at id `from`. */
static int learn_turn(struct reader *r, const struct form *f, size_t i, size_t from,
                      struct texts *t, bool *ret_apart, struct err *err)
{
    size_t to = r->ids.n, end = 0;
    const bool last = i + 1 == json_array_size(f->messages);
    int rc = ERR_OK;
    if (!last) {
        rc = turns(r, f->messages, f->tools, i + 1, true, &t->turn, err);
        end = common(&t->turn, &t->whole);
        if (rc == ERR_OK)
            rc = reader_place(r, t->whole.data, end, of_template, &to, err);
    }
    /* the end of a turn that looks otherwise in the middle can only be seen by its token */
    if (rc == ERR_OK && !learn_answer(r, from, to) && !last && end < t->turn.len)
        *ret_apart = true;
    return rc;
}

/* *ret_apart: it is none, and nothing was added. */
static int together(struct reader *r, const struct form *f, struct texts *t, bool *ret_apart,
                    struct err *err)
{
    const size_t n = json_array_size(f->messages);
    int rc = turns(r, f->messages, f->tools, n, true, &t->whole, err);
    if (rc == ERR_OK)
        rc = reader_encode(r, t->whole.data, t->whole.len, of_template, err);
    for (size_t i = 0; i < n && rc == ERR_OK && !*ret_apart; i++) {
        if (!f->learn[i])
            continue;
        size_t from = 0;
        rc = turns(r, f->messages, f->tools, i, false, &t->prompt, err);
        if (rc == ERR_OK && !begins(&t->whole, &t->prompt)) {
            *ret_apart = true;
            return ERR_OK;
        }
        if (rc == ERR_OK)
            rc = reader_place(r, t->prompt.data, t->prompt.len, of_template, &from, err);
        if (rc == ERR_OK)
            rc = learn_turn(r, f, i, from, t, ret_apart, err);
        if (from > (size_t)r->o.max_length)
            break; /* all that follows is cut */
    }
    return rc != ERR_OK || *ret_apart ? rc : reader_add(r, err);
}

/* --- an example for each answer ---------------------------------------------------------------------- */

/* Stands for an answer; no template has it. */
static const char marker[] = "\xe2\x9f\xa6 lorad \xe2\x9f\xa7";

static bool is_plain(const json_t *m)
{
    const json_t *content = json_object_get(m, "content");
    return (json_string_length(content) > 0 || json_array_size(content) > 0) &&
           json_array_size(json_object_get(m, "tool_calls")) == 0;
}

/* The conversation up to message i, which says the marker. */
static int marked(struct reader *r, const struct form *f, size_t i, struct buf *ret, struct err *err)
{
    json_t *list = json_copy(f->messages), *m = json_copy(json_array_get(f->messages, i));
    int rc = ERR_NOMEM;
    if (list != NULL && m != NULL && json_object_set_new(m, "content", json_string(marker)) == 0 &&
        json_array_set(list, i, m) == 0)
        rc = turns(r, list, f->tools, i + 1, true, ret, err);
    else
        err_nomem(err);
    json_decref(m);
    json_decref(list);
    return rc;
}

/* The prompt is not the beginning of the turn.  Makes t->turn the text to learn from, and gives where
 * in it the answer begins. */
static int find_answer(struct reader *r, const struct form *f, size_t i, struct texts *t,
                       size_t *ret_from, struct err *err)
{
    static const char sentence[] =
        "the chat template writes what comes before the answer in `messages`[%zu] otherwise once the "
        "answer is there, so that the two cannot be told apart";
    int rc = turns(r, f->messages, f->tools, i, true, &t->whole, err);
    if (rc != ERR_OK)
        return rc;
    size_t head = common(&t->prompt, &t->turn); /* where tool calls begin */
    if (is_plain(json_array_get(f->messages, i))) {
        rc = marked(r, f, i, &t->other, err);
        if (rc != ERR_OK)
            return rc;
        const char *at = memmem(t->other.data, t->other.len, marker, sizeof marker - 1);
        if (at == NULL)
            return err_set(err, ERR_INVALID, sentence, i);
        const char *tail = at + sizeof marker - 1;
        const size_t before = (size_t)(at - t->other.data), after = t->other.len - before - (sizeof marker - 1);
        t->other.len = before;
        if (!begins(&t->turn, &t->other) || t->turn.len < before + after || !ends(&t->turn, tail, after))
            return err_set(err, ERR_INVALID, sentence, i);
        head = common(&t->prompt, &t->other);
        if (!begins(&t->other, &t->whole)) { /* earlier turns are written otherwise */
            *ret_from = t->prompt.len;
            if (buf_add(&t->prompt, t->turn.data + before, t->turn.len - before) != ERR_OK)
                return err_nomem(err);
            const struct buf swap = t->turn;
            t->turn = t->prompt;
            t->prompt = swap;
            return ERR_OK;
        }
    }
    if (!begins(&t->turn, &t->whole) || head < t->whole.len)
        return err_set(err, ERR_INVALID, sentence, i);
    *ret_from = head;
    return ERR_OK;
}

/* The last prompt was as long as an example may be, so nothing of this answer would be left. */
static bool out_of_reach(const struct reader *r, size_t last_from)
{
    if (last_from < (size_t)r->o.max_length)
        return false;
    r->rep->cut++;
    r->rep->empty++;
    return true;
}

static int apart(struct reader *r, const struct form *f, struct texts *t, struct err *err)
{
    int rc = ERR_OK;
    size_t from = 0;
    for (size_t i = 0; i < json_array_size(f->messages) && rc == ERR_OK; i++) {
        if (!f->learn[i] || out_of_reach(r, from))
            continue;
        size_t at = 0;
        rc = turns(r, f->messages, f->tools, i, false, &t->prompt, err);
        if (rc == ERR_OK)
            rc = turns(r, f->messages, f->tools, i + 1, true, &t->turn, err);
        if (rc == ERR_OK && begins(&t->turn, &t->prompt))
            at = t->prompt.len;
        else if (rc == ERR_OK)
            rc = find_answer(r, f, i, t, &at, err);
        if (rc == ERR_OK)
            rc = reader_encode(r, t->turn.data, t->turn.len, of_template, err);
        if (rc == ERR_OK)
            rc = reader_place(r, t->turn.data, at, of_template, &from, err);
        if (rc == ERR_OK) {
            learn_answer(r, from, r->ids.n);
            rc = reader_add(r, err);
        }
    }
    return rc;
}

/* --- without a template ------------------------------------------------------------------------------ */

/* EOS ends each answer, and is no part of later prompts. */
static int lines(struct reader *r, const struct form *f, struct texts *t, struct err *err)
{
    int rc = ERR_OK;
    if (f->tools != NULL)
        return err_set(err, ERR_INVALID, "`tools` needs a chat template, and %s has none",
                       r->m.base->name);
    rc = chat_lines_render(f->messages, json_array_size(f->messages), &t->whole, err);
    size_t from = 0;
    for (size_t i = 0; i < json_array_size(f->messages) && rc == ERR_OK; i++) {
        if (!f->learn[i] || out_of_reach(r, from))
            continue;
        buf_free(&t->prompt);
        rc = chat_lines_render(f->messages, i, &t->prompt, err);
        const size_t at = t->prompt.len;
        if (rc == ERR_OK && buf_puts(&t->prompt, " ") != ERR_OK)
            rc = err_nomem(err);
        if (rc == ERR_OK)
            rc = chat_content_text(json_object_get(json_array_get(f->messages, i), "content"), i,
                                   &t->prompt, err);
        if (rc == ERR_OK)
            rc = reader_encode(r, t->prompt.data, t->prompt.len, of_lines, err);
        if (rc == ERR_OK)
            rc = reader_place(r, t->prompt.data, at, of_lines, &from, err);
        if (rc == ERR_OK) {
            reader_learn(r, from, r->ids.n);
            rc = reader_end(r, err);
        }
        if (rc == ERR_OK)
            rc = reader_add(r, err);
    }
    return rc;
}

int reader_chat(struct reader *r, const struct form *f, struct err *err)
{
    struct texts t;
    buf_init(&t.whole, TEXT_MAX);
    buf_init(&t.prompt, TEXT_MAX);
    buf_init(&t.turn, TEXT_MAX);
    buf_init(&t.other, TEXT_MAX);
    bool split = false;
    int rc = r->m.chat == NULL ? lines(r, f, &t, err) : together(r, f, &t, &split, err);
    if (rc == ERR_OK && split)
        rc = apart(r, f, &t, err);
    texts_free(&t);
    return rc;
}
