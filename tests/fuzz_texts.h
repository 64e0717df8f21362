/* fuzz_texts.h - what a tokenizer that was accepted makes of a few texts, and laws about it. */
#ifndef TESTS_FUZZ_TEXTS_H
#define TESTS_FUZZ_TEXTS_H

#include "engine/tokenizer.h"
#include "tests/fuzz.h"

/* Streamed and whole decoding agree. */
static inline void fuzz_stream(const struct tokenizer *t, const struct tok_ids *ids, bool skip)
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

static inline void fuzz_try_text(const struct tokenizer *t, const char *text)
{
    for (int way = 0; way < 2; way++) {
        struct tok_ids ids = { 0 };
        struct err err = { 0 };
        if (tokenizer_encode(t, text, strlen(text), way == 0, way == 0, 4096, &ids, &err) == ERR_OK) {
            for (size_t i = 0; i < ids.n; i++)
                law(ids.ids[i] >= 0 && ids.ids[i] < tokenizer_size(t), "an id is in range");
            fuzz_stream(t, &ids, way == 1);
        } else {
            law(err.msg[0] != '\0', "a failure says why");
        }
        free(ids.ids);
    }
}

static inline void fuzz_try_texts(const struct tokenizer *t)
{
    static const char *const texts[] = {
        "", " ", "Hello, world! It's 12345 o'clock.\n\n  x\t", "ab<s>aab</s> abab <unk>",
        "na\xc3\xafve \xe2\x96\x81 \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x98\x80 e\xcc\x81",
        "\xff\xc3 cut \xe6\xbc", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        fuzz_try_text(t, texts[i]);
}

#endif
