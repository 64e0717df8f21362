/* dataset.h - training data: lines of JSON in, token ids and what is to be learned out.
 *
 * Each line of a file is one object, or the file is one JSON array of them.  The form is found per
 * object, by the first of these that it has (docs/training-data.md):
 *   messages              OpenAI's: assistant messages are learned, unless their weight is 0;
 *                         `tools` go to the chat template
 *   conversations         ShareGPT's from/value, which becomes messages
 *   instruction, output   Alpaca's, with or without `input`: the output is learned
 *   prompt, completion    text or messages: the completion is learned
 *   text                  all of it is learned
 * Other members of an object are not looked at.
 *
 * Tokens are those that serving would have: a prompt of text has what the tokenizer puts in front
 * (BOS; not twice, if the text begins with it), and special tokens in it are recognised; completion
 * and text end with the model's EOS, which is learned.  Conversations are
 * rendered as in chat completions (chat_template.h, chat_messages.h).  What is learned of an answer
 * begins where the prompt ends that serving would have made for it, and ends with the first token
 * that ends generation.  Prompt and answer are tokenized together; a token that holds the end of
 * one and the beginning of the other is learned.
 *
 * Where a template writes earlier turns otherwise once there are later ones (leaves reasoning out,
 * say), each answer becomes an example of its own, behind the prompt that serving would have made;
 * so does each answer of a conversation without a template.
 *
 * A `struct dataset` belongs to one thread.  What it makes (struct train_set, train.h) is immutable.
 * Hash of a set: sha256 over, per example, its length as a 32-bit integer, ids, learn bytes; integers
 * are little-endian. */
#ifndef ENGINE_DATASET_H
#define ENGINE_DATASET_H

#include "engine/chat_template.h"
#include "engine/tokenizer.h"
#include "engine/train.h"

/* Zero is the default of each. */
struct dataset_opts {
    int max_length;      /* 0: the model's positions.  Longer examples are cut at the end */
    bool learn_prompts;  /* prompts in the form of text are learned like completions; of messages
                          * only answers ever are */
    bool skip_bad;       /* bad lines are left out and counted; else one refuses the file */
    uint64_t max_tokens; /* of all examples (5 bytes each in memory); 0: DATASET_MAX_TOKENS */
    size_t max_line;     /* bytes; 0: DATASET_MAX_LINE */
    int64_t now;         /* unix seconds, for templates that write the date; 0: the clock.  Who reads
                          * the same data again later gives the same time */
};
/* What one object may have: bytes, values and members, answers.  They bound memory and time. */
enum { DATASET_MAX_LINE = 16 << 20, DATASET_MAX_VALUES = 1 << 18, DATASET_MAX_ANSWERS = 1024 };
enum { DATASET_BAD_KEPT = 100 };
#define DATASET_MAX_TOKENS ((uint64_t)1 << 31)

struct dataset_bad {
    uint64_t line; /* from 1; of an array: where the element begins */
    char why[240]; /* one sentence, UTF-8 */
};
/* What was read.  `lines` counts objects, good and bad; blank lines count in numbers of lines only. */
struct dataset_report {
    uint64_t lines, bad_lines;
    uint64_t examples, tokens, targets;
    uint64_t cut;    /* examples that were longer than max_length */
    uint64_t empty;  /* examples left out because the cut left nothing to learn */
    int longest;     /* tokens, before the cut */
    struct dataset_bad *bad; /* the first DATASET_BAD_KEPT; dataset_report_free() */
    size_t nbad;
};
void dataset_report_free(struct dataset_report *r); /* NULL is fine */

/* What the data is read for; borrowed as long as the dataset is open. */
struct dataset_model {
    const struct base *base;
    const struct tokenizer *tok;
    const struct chat_template *chat; /* NULL: conversations become plain lines */
};

/* Feed a file in pieces of any size, then end it.  `m` NULL: syntax and shape are checked, nothing
 * is tokenized, and there is no set: for uploads. */
struct dataset;
int dataset_open(const struct dataset_model *m, const struct dataset_opts *o, struct dataset **ret,
                 struct err *err); /* `o` may be NULL */
/* ERR_NOMEM or ERR_TOO_LARGE (max_tokens); bad lines are no failure here. */
int dataset_feed(struct dataset *d, const void *data, size_t len, struct err *err);
/* Frees d, also on failure.  *rep (may be NULL) is filled in any case.  ERR_INVALID, with the number
 * of bad lines and the first of them, or because nothing is left to learn from; `ret` may be NULL. */
int dataset_end(struct dataset *d, struct dataset_report *rep, struct train_set **ret,
                struct err *err);
void dataset_abort(struct dataset *d); /* NULL is fine */

/* The same for a file.  `stop` (may be NULL) is called with bytes done and in all, between pieces;
 * true: ERR_CANCELLED. */
typedef bool (*dataset_stop_fn)(void *ud, uint64_t done, uint64_t total);
int dataset_read(const struct dataset_model *m, const char *path, const struct dataset_opts *o,
                 dataset_stop_fn stop, void *ud, struct dataset_report *rep,
                 struct train_set **ret, struct err *err);

/* A tensor of ids, I32 or I64 [T] or [N, T], in a safetensors file: N examples, of which all but the
 * first token is learned.  `V`: the vocabulary; rows longer than max_length are cut. */
int dataset_tokens(const char *path, const char *name, int V, int max_length,
                   struct dataset_report *rep, struct train_set **ret, struct err *err);

void train_set_free(struct train_set *s); /* NULL is fine */

#endif
