/* fuzz_dataset.c - training data.  Up to the first NUL the input is a chat template (none if it is
 * empty), behind it the file; the first byte of the file's part chooses options.
 *
 * Laws: fed in pieces of another size it gives the same; what is checked without a model is bad with
 * one; a set is what its report says, its ids are the model's, and something in each example is
 * learned. */
#include "engine/dataset.h"
#include "tests/fuzz.h"

enum { VOCAB = 2048, POSITIONS = 96 };

static struct tokenizer *tok;

static void load_tokenizer(void)
{
    struct err err = { 0 };
    char *json;
    size_t len;
    law(file_read("examples/demo-base/tokenizer.json", 1 << 20, &json, &len, &err) == ERR_OK, err.msg);
    law(tokenizer_load(json, len, &tok, &err) == ERR_OK, err.msg);
    free(json);
}

/* ERR_OK or what dataset_end() says. */
static int feed(const struct dataset_model *m, const char *s, size_t len, size_t piece,
                const struct dataset_opts *o, struct dataset_report *rep, struct train_set **ret)
{
    struct dataset *d;
    struct err err = { 0 };
    *ret = NULL;
    law(dataset_open(m, o, &d, &err) == ERR_OK, "these options are valid");
    for (size_t i = 0; i < len; i += piece)
        law(dataset_feed(d, s + i, len - i < piece ? len - i : piece, &err) == ERR_OK, err.msg);
    const int rc = dataset_end(d, rep, ret, &err);
    law(rc == ERR_OK || err.msg[0] != '\0', "a failure says why");
    for (size_t i = 0; i < rep->nbad; i++)
        law(rep->bad[i].line > 0 && rep->bad[i].why[0] != '\0', "a bad line has a number and a reason");
    law(rep->nbad == (rep->bad_lines < DATASET_BAD_KEPT ? rep->bad_lines : DATASET_BAD_KEPT) &&
        rep->bad_lines <= rep->lines, "bad lines are counted");
    return rc;
}

static void check_set(const struct train_set *s, const struct dataset_report *rep, int max_length)
{
    uint64_t tokens = 0, targets = 0;
    law(s->n > 0 && s->n == rep->examples, "examples are counted");
    for (size_t i = 0; i < s->n; i++) {
        const struct train_example *e = &s->examples[i];
        uint64_t some = 0;
        law(e->n >= 2 && e->n <= max_length && e->n <= rep->longest, "lengths are in range");
        law(!e->learn[0] && e->learn[e->n - 1] == 1, "the last is learned, the first is not");
        for (int k = 0; k < e->n; k++) {
            law(e->tokens[k] >= 0 && e->tokens[k] < VOCAB && e->learn[k] <= 1, "ids are the model's");
            some += e->learn[k];
        }
        tokens += (uint64_t)e->n;
        targets += some;
    }
    law(tokens == s->tokens && targets == s->targets && tokens == rep->tokens && targets == rep->targets,
        "sums are right");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (tok == NULL)
        load_tokenizer();
    static char name[] = "fuzz";
    struct base base = { .name = name, .tokenizer_config = "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}" };
    base.arch.V = VOCAB;
    base.arch.max_positions = POSITIONS;
    base.arch.eos[0] = 2;
    base.arch.neos = 1;
    struct chat_template *chat = NULL;
    struct err err = { 0 };
    const size_t cut = fuzz_cut(data, len);
    if (cut == len)
        return 0;
    char *text = fuzz_text(data, cut);
    if (cut > 0 && chat_template_open("fuzz", text, base.tokenizer_config, &chat, &err) != ERR_OK) {
        free(text);
        return 0;
    }
    const char *file = (const char *)data + cut + 1;
    size_t n = len - cut - 1;
    const uint8_t how = n > 0 ? (uint8_t)file[0] : 0;
    if (n > 0)
        file++, n--;
    const struct dataset_opts o = { .skip_bad = how & 1, .learn_prompts = how & 2, .max_line = how & 4 ? 64 : 0,
                                    .max_length = how & 8 ? 7 : 0, .now = 1700000000 };
    const struct dataset_model m = { &base, tok, chat };
    struct dataset_report rep[3];
    struct train_set *set[3];
    const int whole = feed(&m, file, n, n + 1, &o, &rep[0], &set[0]);
    const int pieces = feed(&m, file, n, 1 + (how >> 4), &o, &rep[1], &set[1]);
    feed(NULL, file, n, n + 1, &o, &rep[2], &set[2]);
    law(whole == pieces && rep[0].lines == rep[1].lines && rep[0].bad_lines == rep[1].bad_lines,
        "the size of pieces changes nothing");
    law(rep[2].lines == rep[0].lines && rep[2].bad_lines <= rep[0].bad_lines, "shapes are part of the whole check");
    law(set[2] == NULL && (set[0] != NULL) == (whole == ERR_OK), "a set is there if nothing failed");
    if (set[0] != NULL) {
        check_set(set[0], &rep[0], o.max_length ? o.max_length : POSITIONS);
        law(memcmp(set[0]->hash, set[1]->hash, 32) == 0, "nor does it change the set");
    }
    for (int i = 0; i < 3; i++) {
        dataset_report_free(&rep[i]);
        train_set_free(set[i]);
    }
    chat_template_free(chat);
    free(text);
    return 0;
}
