/* fuzz_tokenizer.c - tokenizer.json, and what an accepted one makes of a few texts. */
#include "engine/tokenizer.h"
#include "tests/fuzz.h"

static const char *const texts[] = {
    "", " ", "Hello, world! It's 12345 o'clock.\n\n  x\t", "ab<s>aab</s> abab <unk>",
    "na\xc3\xafve \xe2\x96\x81 \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x98\x80 e\xcc\x81",
    "\xff\xc3 cut \xe6\xbc", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
};

/* Streamed and whole decoding agree. */
static void check_stream(const struct tokenizer *t, const struct tok_ids *ids, bool skip)
{
    struct buf whole, parts;
    struct tok_stream *s = NULL;
    struct err err = { 0 };
    buf_init(&whole, 1 << 24);
    buf_init(&parts, 1 << 24);
    const int rc = tokenizer_decode(t, ids->ids, ids->n, skip, &whole, &err);
    law(rc == ERR_OK || rc == ERR_TOO_LARGE, "ids of the tokenizer decode");
    law(tok_stream_open(t, skip, false, &s, &err) == ERR_OK, "memory");
    int added = ERR_OK;
    for (size_t i = 0; i < ids->n && added == ERR_OK; i++)
        added = tok_stream_add(s, ids->ids[i], &parts);
    if (added == ERR_OK)
        added = tok_stream_end(s, &parts);
    if (rc == ERR_OK && added == ERR_OK)
        law(whole.len == parts.len && (whole.len == 0 || memcmp(whole.data, parts.data, whole.len) == 0),
            "a stream gives the text that decoding gives");
    tok_stream_free(s);
    buf_free(&whole);
    buf_free(&parts);
}

static void try_text(const struct tokenizer *t, const char *text)
{
    for (int way = 0; way < 2; way++) {
        struct tok_ids ids = { 0 };
        struct err err = { 0 };
        if (tokenizer_encode(t, text, strlen(text), way == 0, way == 0, 4096, &ids, &err) == ERR_OK) {
            for (size_t i = 0; i < ids.n; i++)
                law(ids.ids[i] >= 0 && ids.ids[i] < tokenizer_size(t), "an id is in range");
            check_stream(t, &ids, way == 1);
        } else {
            law(err.msg[0] != '\0', "a failure says why");
        }
        free(ids.ids);
    }
}

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
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        try_text(t, texts[i]);
    tokenizer_free(t);
    return 0;
}
