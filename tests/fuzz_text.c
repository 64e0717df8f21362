/* fuzz_text.c - hostile texts for a good tokenizer: the demo model's.
 *
 * The first byte's bits: 0 add special tokens, 1 recognise them in the text, 2 take the rest as
 * ids of two bytes each instead of text. */
#include "engine/tokenizer.h"
#include "tests/fuzz.h"

static struct tokenizer *demo(void)
{
    static struct tokenizer *t;
    char *json;
    size_t len;
    struct err err = { 0 };
    if (t != NULL)
        return t;
    law(file_read("examples/demo-base/tokenizer.json", 1 << 24, &json, &len, &err) == ERR_OK &&
            tokenizer_load(json, len, &t, &err) == ERR_OK,
        "examples/demo-base/tokenizer.json is read");
    free(json);
    return t;
}

static void decode(const struct tokenizer *t, const struct tok_ids *ids, struct buf *whole)
{
    struct buf parts;
    struct tok_stream *s = NULL;
    struct err err = { 0 };
    buf_init(&parts, 1 << 24);
    bool known = true;
    for (size_t i = 0; i < ids->n; i++)
        known = known && ids->ids[i] >= 0 && ids->ids[i] < tokenizer_size(t);
    const int rc = tokenizer_decode(t, ids->ids, ids->n, false, whole, &err);
    law(rc == ERR_OK || !known, "known ids decode");
    law(tok_stream_open(t, false, false, &s, &err) == ERR_OK, "memory");
    int added = ERR_OK;
    for (size_t i = 0; i < ids->n && added == ERR_OK; i++)
        added = tok_stream_add(s, ids->ids[i], &parts);
    if (added == ERR_OK && rc == ERR_OK) {
        law(tok_stream_end(s, &parts) == ERR_OK, "a stream ends");
        law(whole->len == parts.len &&
                (whole->len == 0 || memcmp(whole->data, parts.data, whole->len) == 0),
            "a stream gives the text that decoding gives");
    }
    tok_stream_free(s);
    buf_free(&parts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    const struct tokenizer *t = demo();
    if (len == 0)
        return 0;
    const uint8_t flags = *data++;
    len--;
    struct tok_ids ids = { 0 };
    struct buf text;
    struct err err = { 0 };
    buf_init(&text, 1 << 24);
    if (flags & 4) {
        ids.n = len / 2;
        ids.ids = malloc(ids.n * sizeof *ids.ids + 1);
        law(ids.ids != NULL, "memory");
        for (size_t i = 0; i < ids.n; i++)
            ids.ids[i] = (int16_t)(data[2 * i] | data[2 * i + 1] << 8);
        decode(t, &ids, &text);
    } else {
        char *s = fuzz_text(data, len);
        const int rc = tokenizer_encode(t, s, len, flags & 1, flags & 2, 0, &ids, &err);
        law(rc == ERR_OK || err.msg[0] != '\0', "a failure says why");
        decode(t, &ids, &text);
        free(s);
    }
    free(ids.ids);
    buf_free(&text);
    return 0;
}
