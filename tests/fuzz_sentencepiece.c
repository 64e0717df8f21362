/* fuzz_sentencepiece.c - tokenizer.model as tokenizer.json, with what lies beside it: the text of
 * tokenizer_config.json, a NUL, added_tokens.json, a NUL, the model.  A text that is empty is a file
 * that is not there. */
#include "engine/sentencepiece.h"
#include "tests/fuzz_texts.h"

/* Cuts the first text off; NULL if it is empty. */
static char *cut_text(const uint8_t **data, size_t *len)
{
    const size_t n = fuzz_cut(*data, *len), skip = n < *len ? n + 1 : n;
    char *s = n > 0 ? fuzz_text(*data, n) : NULL;
    *data += skip;
    *len -= skip;
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct err err = { 0 };
    char *config = cut_text(&data, &len), *added = cut_text(&data, &len);
    char *model = fuzz_text(data, len), *json = NULL;
    struct tokenizer *t = NULL;
    int rc = spm_tokenizer(model, len, config, added, &json, &err);
    if (rc == ERR_OK)
        rc = tokenizer_load(json, strlen(json), &t, &err);
    law(rc == ERR_OK || err.msg[0] != '\0', "a failure says why");
    if (rc == ERR_OK)
        fuzz_try_texts(t);
    tokenizer_free(t);
    free(json);
    free(model);
    free(added);
    free(config);
    return 0;
}
