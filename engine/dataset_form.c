/* dataset_form.c - one object of training data: which form it has, and what it says in it. */
#include "engine/dataset_int.h"

#include "engine/chat_messages.h"
#include "engine/json_kind.h"

#include <stdlib.h>
#include <string.h>

/* A member that is there and not null. */
static const json_t *member(const json_t *o, const char *name)
{
    const json_t *v = json_object_get(o, name);
    return json_is_null(v) ? NULL : v;
}

static int get_text(const json_t *o, const char *name, struct err *err, const json_t **ret)
{
    const json_t *v = json_object_get(o, name);
    if (!json_is_string(v))
        return err_set(err, ERR_INVALID, "`%s` must be a string, not %s", name,
                       v ? json_kind(v) : "absent");
    *ret = v;
    return ERR_OK;
}

static int add_text(struct buf *b, const json_t *text)
{
    return buf_add(b, json_string_value(text), json_string_length(text));
}

/* --- messages -------------------------------------------------------------------------------------- */

static int bad(size_t i, struct err *err, const char *what, const char *detail)
{
    return err_set(err, ERR_INVALID, "`messages`[%zu]%s%.60s", i, what, detail);
}

/* 1 without `weight`. */
static int read_weight(const json_t *m, size_t i, bool assistant, int *ret, struct err *err)
{
    const json_t *w = member(m, "weight");
    *ret = 1;
    if (w == NULL)
        return ERR_OK;
    const double v = json_is_number(w) ? json_number_value(w) : -1;
    if (v != 0 && v != 1)
        return bad(i, err, ".weight must be 0 or 1", "");
    if (v == 1 && !assistant)
        return bad(i, err, ".weight is 1, but only answers of the assistant are learned", "");
    *ret = v == 1;
    return ERR_OK;
}

/* What chat_messages_check() leaves to the template must be there to be learned from. */
static int check_turn(const json_t *m, size_t i, struct err *err)
{
    static const char *const roles[] = { "system", "developer", "user", "assistant", "tool" };
    const char *role = json_string_value(json_object_get(m, "role"));
    size_t k = 0;
    while (k < 5 && strcmp(roles[k], role) != 0)
        k++;
    if (k == 5)
        return bad(i, err, ".role must be system, developer, user, assistant or tool, not ", role);
    const json_t *calls = member(m, "tool_calls");
    if (calls != NULL && !json_is_array(calls))
        return bad(i, err, ".tool_calls must be an array, not ", json_kind(calls));
    for (size_t c = 0; c < json_array_size(calls); c++)
        if (!json_is_object(json_array_get(calls, c)))
            return bad(i, err, ".tool_calls must hold objects, not ",
                       json_kind(json_array_get(calls, c)));
    if (member(m, "function_call") != NULL)
        return bad(i, err, ".function_call is not supported: use tool_calls", "");
    if (member(m, "content") == NULL && (k != 3 || json_array_size(calls) == 0))
        return bad(i, err, k == 3 ? " has neither content nor tool_calls" : " has no content", "");
    return ERR_OK;
}

/* `list` is copied to f->messages behind those that are there; `learnable`: its answers are. */
static int add_messages(struct form *f, const json_t *list, bool learnable, struct err *err)
{
    const size_t had = json_array_size(f->messages), n = had + json_array_size(list);
    uint8_t *learn = realloc(f->learn, n ? n : 1);
    if (learn == NULL)
        return err_nomem(err);
    f->learn = learn;
    for (size_t i = had; i < n; i++) {
        json_t *m = json_copy(json_array_get(list, i - had));
        if (m == NULL || json_array_append_new(f->messages, m) != 0)
            return err_nomem(err);
    }
    int rc = chat_messages_check(f->messages, err);
    for (size_t i = had; i < n && rc == ERR_OK; i++) {
        json_t *m = json_array_get(f->messages, i);
        const char *role = json_string_value(json_object_get(m, "role"));
        const bool assistant = strcmp(role, "assistant") == 0;
        int weight = 0;
        rc = check_turn(m, i, err);
        if (rc == ERR_OK)
            rc = read_weight(m, i, assistant, &weight, err);
        learn[i] = learnable && assistant && weight;
        json_object_del(m, "weight");
    }
    return rc;
}

static int check_learned(const struct form *f, struct err *err)
{
    size_t answers = 0;
    for (size_t i = 0; i < json_array_size(f->messages); i++)
        answers += f->learn[i];
    if (answers == 0)
        return err_set(err, ERR_INVALID, "there is nothing to learn: no message is the assistant's "
                       "and has a weight of 1");
    if (answers > DATASET_MAX_ANSWERS)
        return err_set(err, ERR_INVALID, "it has %zu answers: at most %d are learned from one line",
                       answers, DATASET_MAX_ANSWERS);
    if (f->learn[0])
        return bad(0, err, " is an answer, and nothing comes before it", "; give it \"weight\": 0");
    return ERR_OK;
}

static int get_list(const json_t *o, const char *name, const json_t **ret, struct err *err)
{
    const json_t *v = json_object_get(o, name);
    if (!json_is_array(v) || json_array_size(v) == 0)
        return err_set(err, ERR_INVALID, "`%s` must be an array with at least one message, not %s",
                       name, v == NULL ? "absent" : json_is_array(v) ? "empty" : json_kind(v));
    *ret = v;
    return ERR_OK;
}

static int read_tools(const json_t *o, struct form *f, struct err *err)
{
    json_t *tools = json_object_get(o, "tools");
    if (member(o, "functions") != NULL)
        return err_set(err, ERR_INVALID, "`functions` is not supported: use `tools`");
    if (tools == NULL || json_is_null(tools) || (json_is_array(tools) && json_array_size(tools) == 0))
        return ERR_OK;
    if (!json_is_array(tools))
        return err_set(err, ERR_INVALID, "`tools` must be an array of objects, not %s",
                       json_kind(tools));
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (!json_is_object(json_array_get(tools, i)))
            return err_set(err, ERR_INVALID, "`tools`[%zu] must be an object, not %s", i,
                           json_kind(json_array_get(tools, i)));
    f->tools = tools;
    return ERR_OK;
}

static int start_messages(const json_t *o, struct form *f, struct err *err)
{
    f->messages = json_array();
    return f->messages ? read_tools(o, f, err) : err_nomem(err);
}

static int read_messages(const json_t *o, struct form *f, struct err *err)
{
    const json_t *list = NULL;
    int rc = get_list(o, "messages", &list, err);
    if (rc == ERR_OK)
        rc = start_messages(o, f, err);
    if (rc == ERR_OK)
        rc = add_messages(f, list, true, err);
    return rc != ERR_OK ? rc : check_learned(f, err);
}

/* --- ShareGPT ---------------------------------------------------------------------------------------- */

static json_t *turn(const char *role, const json_t *text, const json_t *weight)
{
    json_t *m = json_pack("{s:s, s:O}", "role", role, "content", (json_t *)text);
    if (m != NULL && weight != NULL)
        json_object_set(m, "weight", (json_t *)weight);
    return m;
}

static int read_turn(const json_t *m, size_t i, json_t *list, struct err *err)
{
    static const struct { const char *from, *role; } names[] = {
        { "human", "user" }, { "user", "user" }, { "gpt", "assistant" },
        { "assistant", "assistant" }, { "system", "system" },
    };
    const char *from = json_string_value(json_object_get(m, "from"));
    const json_t *value = json_object_get(m, "value");
    size_t k = 0;
    while (k < 5 && (from == NULL || strcmp(names[k].from, from) != 0))
        k++;
    if (k == 5)
        return err_set(err, ERR_INVALID, "`conversations`[%zu].from must be human, gpt or system, "
                       "not %.60s", i, from ? from : "absent");
    if (!json_is_string(value))
        return err_set(err, ERR_INVALID, "`conversations`[%zu].value must be a string, not %s", i,
                       value ? json_kind(value) : "absent");
    if (json_array_append_new(list, turn(names[k].role, value, json_object_get(m, "weight"))) != 0)
        return err_nomem(err);
    return ERR_OK;
}

static int read_sharegpt(const json_t *o, struct form *f, struct err *err)
{
    const json_t *turns = NULL, *system = member(o, "system");
    json_t *list = json_array();
    int rc = list ? get_list(o, "conversations", &turns, err) : err_nomem(err);
    if (rc == ERR_OK && system != NULL && !json_is_string(system))
        rc = err_set(err, ERR_INVALID, "`system` must be a string, not %s", json_kind(system));
    if (rc == ERR_OK && json_string_length(system) > 0 &&
        json_array_append_new(list, turn("system", system, NULL)) != 0)
        rc = err_nomem(err);
    for (size_t i = 0; i < json_array_size(turns) && rc == ERR_OK; i++)
        rc = read_turn(json_array_get(turns, i), i, list, err);
    if (rc == ERR_OK)
        rc = start_messages(o, f, err);
    if (rc == ERR_OK)
        rc = add_messages(f, list, true, err);
    if (rc == ERR_OK)
        rc = check_learned(f, err);
    json_decref(list);
    return rc;
}

/* --- the forms of text -------------------------------------------------------------------------------- */

static int read_alpaca(const json_t *o, struct form *f, struct err *err)
{
    static const char no_input[] =
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n";
    static const char with_input[] =
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n";
    const json_t *instruction = NULL, *input = member(o, "input"), *output = NULL;
    int rc = get_text(o, "instruction", err, &instruction);
    if (rc == ERR_OK && input != NULL)
        rc = get_text(o, "input", err, &input);
    if (rc == ERR_OK)
        rc = get_text(o, "output", err, &output);
    if (rc != ERR_OK)
        return rc;
    const bool has_input = json_string_length(input) > 0;
    int out = buf_puts(&f->prompt, has_input ? with_input : no_input);
    out |= add_text(&f->prompt, instruction);
    if (has_input) {
        out |= buf_puts(&f->prompt, "\n\n### Input:\n");
        out |= add_text(&f->prompt, input);
    }
    out |= buf_puts(&f->prompt, "\n\n### Response:\n");
    out |= add_text(&f->answer, output);
    return out != 0 ? err_nomem(err) : ERR_OK;
}

/* Both text, or both messages. */
static int read_completion(const json_t *o, struct form *f, struct err *err)
{
    const json_t *prompt = json_object_get(o, "prompt"), *completion = NULL;
    int rc;
    if (!json_is_array(prompt)) {
        rc = get_text(o, "prompt", err, &prompt);
        if (rc == ERR_OK)
            rc = get_text(o, "completion", err, &completion);
        if (rc == ERR_OK && (add_text(&f->prompt, prompt) | add_text(&f->answer, completion)) != 0)
            rc = err_nomem(err);
        return rc;
    }
    rc = get_list(o, "prompt", &prompt, err);
    if (rc == ERR_OK)
        rc = get_list(o, "completion", &completion, err);
    if (rc == ERR_OK)
        rc = start_messages(o, f, err);
    if (rc == ERR_OK)
        rc = add_messages(f, prompt, false, err);
    if (rc == ERR_OK)
        rc = add_messages(f, completion, true, err);
    return rc != ERR_OK ? rc : check_learned(f, err);
}

static int read_text(const json_t *o, struct form *f, struct err *err)
{
    const json_t *text = NULL;
    int rc = get_text(o, "text", err, &text);
    if (rc == ERR_OK && json_string_length(text) == 0)
        rc = err_set(err, ERR_INVALID, "`text` is empty");
    if (rc == ERR_OK && add_text(&f->answer, text) != 0)
        rc = err_nomem(err);
    return rc;
}

int form_read(const json_t *object, struct form *ret, struct err *err)
{
    static const struct {
        const char *name, *with; /* both members must be there; NULL: one is enough */
        int (*read)(const json_t *o, struct form *f, struct err *err);
    } forms[] = {
        { "messages", NULL, read_messages },
        { "conversations", NULL, read_sharegpt },
        { "instruction", "output", read_alpaca },
        { "prompt", "completion", read_completion },
        { "text", NULL, read_text },
    };
    *ret = (struct form){ 0 };
    buf_init(&ret->prompt, SIZE_MAX / 4);
    buf_init(&ret->answer, SIZE_MAX / 4);
    if (!json_is_object(object))
        return err_set(err, ERR_INVALID, "it must be an object, not %s", json_kind(object));
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++)
        if (member(object, forms[i].name) != NULL &&
            (forms[i].with == NULL || json_object_get(object, forms[i].with) != NULL))
            return forms[i].read(object, ret, err);
    if (json_object_get(object, "preferred_output") != NULL || json_object_get(object, "chosen") != NULL)
        return err_set(err, ERR_INVALID, "it has pairs of preferences, which are not supported: "
                       "one answer is needed");
    return err_set(err, ERR_INVALID, "it has none of the forms that are known: `messages`, "
                   "`conversations`, `instruction` and `output`, `prompt` and `completion`, `text`");
}

void form_free(struct form *f)
{
    buf_free(&f->prompt);
    buf_free(&f->answer);
    json_decref(f->messages);
    free(f->learn);
    *f = (struct form){ 0 };
}
