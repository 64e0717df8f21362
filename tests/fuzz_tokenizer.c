/* fuzz_tokenizer.c - tokenizer.json, and what an accepted one makes of a few texts. */
#include "tests/fuzz_texts.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct tokenizer *t = NULL;
    struct err err = { 0 };
    char *json = fuzz_text(data, len);
    const int rc = tokenizer_load(json, len, &t, &err);
    free(json);
    if (rc != ERR_OK) {
        law(err.msg[0] != '\0', "a failure says why");
        return 0;
    }
    struct buf piece;
    buf_init(&piece, 1 << 20);
    for (int id = -1; id <= tokenizer_size(t) && id < 300; id++) {
        tokenizer_piece(t, id, &piece);
        tokenizer_is_special(t, id);
    }
    buf_free(&piece);
    fuzz_try_texts(t);
    tokenizer_free(t);
    return 0;
}
