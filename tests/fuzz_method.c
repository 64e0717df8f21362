/* fuzz_method.c - the `method` of a fine-tuning job: what is accepted is written and read again as the
 * same, and passes the trainer's own checks. */
#include "api/api_int.h"
#include "api/train_params.h"
#include "tests/fuzz.h"

static char *written(const struct train_opts *o)
{
    json_t *j = api_train_params_json(o);
    char *text = j != NULL ? json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(j);
    law(text != NULL, "options can be written");
    return text;
}

static void check_method(const struct train_opts *o)
{
    struct train_opts again;
    struct err err = { 0 };
    char *first = written(o);
    json_t *j = json_loads(first, 0, NULL);
    law(j != NULL && api_train_params(j, &again, &err) == ERR_OK, "what was written can be read");
    char *second = written(&again);
    law(strcmp(first, second) == 0, "what was read is what was written");
    train_opts_free(&again);
    json_decref(j);
    free(first);
    free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *text = fuzz_text(data, len);
    const struct api_req req = { .body = text, .body_len = len };
    struct train_opts o;
    struct err err = { 0 };
    json_t *method = NULL;
    int rc = body_json(&req, false, &method, &err);
    if (rc == ERR_OK)
        rc = api_train_params(method, &o, &err);
    if (rc == ERR_OK) {
        check_method(&o);
        train_opts_free(&o);
    } else {
        law(err.msg[0] != '\0', "a failure says why");
    }
    api_train_params_fixed(method);
    json_decref(method);
    free(text);
    return 0;
}
