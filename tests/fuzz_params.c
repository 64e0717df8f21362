/* fuzz_params.c - the fields of a completions or chat body, without an engine. */
#include "api/gen.h"
#include "tests/fuzz.h"

enum { VOCAB = 512 };

static void check_params(const struct gen_params *p)
{
    law(p->n >= 1 && p->n <= GEN_MAX_CHOICES, "n is in range");
    law(p->nstop <= GEN_STOP_MAX && p->nadapters <= LORA_SET_MAX, "lists are bounded");
    law(p->sample.temperature >= 0 && p->sample.top_p >= 0 && p->sample.top_p <= 1,
        "sampling is in range");
    for (int i = 0; i < p->sample.nbias; i++)
        law(p->sample.bias[i].id >= 0 && p->sample.bias[i].id < VOCAB, "a bias names a token");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *text = fuzz_text(data, len);
    const struct api_req req = { .body = text, .body_len = len };
    for (int chat = 0; chat < 2; chat++) {
        struct gen_params p = { 0 };
        struct err err = { 0 };
        json_t *body = NULL;
        int rc = body_json(&req, chat, &body, &err);
        if (rc == ERR_OK)
            rc = gen_params_parse(body, chat, VOCAB, &p, &err);
        if (rc == ERR_OK) {
            check_params(&p);
            gen_params_free(&p);
        } else {
            law(err.msg[0] != '\0', "a failure says why");
        }
        json_decref(body);
    }
    free(text);
    return 0;
}
