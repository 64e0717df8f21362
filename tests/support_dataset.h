/* support_dataset.h - for tests of training data: models as far as it needs them, and what is expected
 * of an example, put together by hand.  A failure fails the test. */
#ifndef TESTS_SUPPORT_DATASET_H
#define TESTS_SUPPORT_DATASET_H

#include "engine/dataset.h"

/* Of the base, training data needs shapes, ends and the config of the tokenizer. */
struct data_model {
    struct base base;
    struct tokenizer *tok;      /* tokenizer_free() */
    struct chat_template *chat; /* or NULL; chat_template_free() */
};
/* With the demo base's tokenizer; 512 positions. */
struct data_model data_demo(void);
struct base data_base(int V, int positions, int eos, const char *tokenizer_config);
struct tokenizer *data_tokenizer(const char *json, size_t len);
/* Of bytes, with every marker of the usual templates as a special token. */
struct tokenizer *data_markers(int *ret_size);
void data_template(struct data_model *m, const char *name, const char *text);
struct dataset_model data_of(const struct data_model *m);
char *data_slurp(const char *path, size_t *len); /* free() it */

/* The text in pieces of n bytes, from dataset_open() to dataset_end(). */
int data_feed(const struct dataset_model *m, const char *text, size_t len, size_t n,
              const struct dataset_opts *o, struct dataset_report *rep, struct train_set **ret,
              struct err *err);
/* `rep` may be NULL. */
struct train_set *data_read(const struct data_model *m, const char *text, const struct dataset_opts *o,
                            struct dataset_report *rep);

struct data_want {
    int32_t ids[32768];
    uint8_t learn[32768];
    int n;
};
void data_want_id(struct data_want *w, int32_t id, int learn);
/* The ids of a text alone, without special tokens in front. */
void data_want_text(struct data_want *w, const struct data_model *m, const char *text, int learn);
void data_assert(const struct train_set *s, size_t i, const struct data_want *w);

/* Messages and lines. */
#define USER(x) "{\"role\":\"user\",\"content\":\"" x "\"}"
#define SAYS(x) "{\"role\":\"assistant\",\"content\":\"" x "\"}"
#define SYSTEM(x) "{\"role\":\"system\",\"content\":\"" x "\"}"
#define OFF(x) "{\"role\":\"assistant\",\"weight\":0,\"content\":\"" x "\"}"
#define CHAT(x) "{\"messages\":[" x "]}"
#define DATA_CHATML \
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" \
    "{% if m.content %}{{ m.content }}{% endif %}" \
    "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function.name ~ (c.function.arguments|tojson) }}{% endfor %}" \
    "{{ '<|im_end|>\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

#endif
