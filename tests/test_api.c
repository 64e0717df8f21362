/* test_api.c - requests as tables, without sockets, on the demo base. */
#include "tests/support_serve.h"

#include <math.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static int setup(void **state)
{
    *state = serve_open(NULL);
    serve_add_adapter(*state, STORE_TENANT_DEFAULT, "shakespeare", DEMO_ADAPTER("shakespeare"));
    serve_add_adapter(*state, STORE_TENANT_DEFAULT, "whitman", DEMO_ADAPTER("whitman"));
    return 0;
}

static int teardown(void **state)
{
    serve_close(*state);
    return 0;
}

static void call(struct serve *s, const char *method, const char *path, const char *body,
                 struct serve_resp *ret)
{
    const struct serve_req r = { .method = method, .path = path, .body = body };
    serve_call(s, &r, ret);
}

/* A member by path, "choices.0.text". */
static json_t *at(const struct serve_resp *r, const char *path)
{
    json_t *j = r->json;
    while (j != NULL && *path != '\0') {
        char key[40];
        const size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        j = json_is_array(j) ? json_array_get(j, (size_t)atoi(key)) : json_object_get(j, key);
        path += n + (path[n] == '.');
    }
    return j;
}

static const char *text_at(const struct serve_resp *r, const char *path)
{
    const char *s = json_string_value(at(r, path));
    return s ? s : "(none)";
}

static json_int_t int_at(const struct serve_resp *r, const char *path)
{
    return json_is_integer(at(r, path)) ? json_integer_value(at(r, path)) : -999;
}

/* --- errors -------------------------------------------------------------------------------------- */

#define C "/v1/completions"
#define CHAT "/v1/chat/completions"

static void errors_have_a_status_and_a_sentence_that_names_the_fault(void **state)
{
    static const struct { const char *method, *path, *body; int status; const char *says; } cases[] = {
        { "GET", "/nothing", NULL, 404, "/nothing" },
        { "GET", "/v1/nothing", NULL, 404, "/v1/nothing" },
        { "GET", "/v1/adapters/", NULL, 404, "" },
        { "PATCH", "/v1/models", NULL, 405, "GET" },
        { "POST", "/v1/models", NULL, 405, "GET" },
        { "GET", C, NULL, 405, "POST" },
        { "POST", "/health", NULL, 405, "GET" },
        { "GET", "/v1/models/nobody", NULL, 404, "nobody" },
        { "GET", "/v1/models/no/such", NULL, 404, "" },
        { "GET", "/v1/adapters/nobody", NULL, 404, "nobody" },
        { "GET", "/v1/adapters/nobody/versions", NULL, 404, "nobody" },
        { "GET", "/v1/adapters/nobody/download", NULL, 404, "nobody" },
        { "GET", "/v1/adapters/nobody/diff?with=whitman", NULL, 404, "nobody" },
        { "GET", "/v1/adapters/whitman/diff?with=nobody", NULL, 404, "nobody" },
        { "GET", "/v1/adapters/whitman/diff", NULL, 400, "with which" },
        { "GET", "/v1/adapters/shakespeare@9", NULL, 404, "9" },
        { "GET", "/v1/adapters/other/shakespeare/versions", NULL, 404, "" },
        { "GET", "/v1/adapters?limit=0", NULL, 400, "limit" },
        { "GET", "/v1/adapters?limit=x", NULL, 400, "limit" },
        { "DELETE", "/v1/adapters/nobody", NULL, 404, "nobody" },
        { "DELETE", "/v1/adapters/shakespeare@1", NULL, 409, "live" },
        { "DELETE", "/v1/adapters/shakespeare@0", NULL, 400, "@" },
        { "DELETE", "/v1/adapters/shakespeare@1x", NULL, 400, "@" },
        { "POST", "/v1/adapters/shakespeare/promote", NULL, 400, "which version" },
        { "POST", "/v1/adapters/shakespeare@1/promote", "{\"version\":2}", 400, "version" },
        { "POST", "/v1/adapters/shakespeare/promote", "{\"version\":\"1\"}", 400, "version" },
        { "POST", "/v1/adapters/shakespeare/promote", "{\"v\":1}", 400, "`v`" },
        { "POST", "/v1/adapters/shakespeare@7/promote", NULL, 404, "7" },
        { "POST", "/v1/adapters", "{}", 415, "multipart" },
        /* bodies */
        { "POST", C, NULL, 400, "body" },
        { "POST", C, "", 400, "body" },
        { "POST", C, "{", 400, "JSON" },
        { "POST", C, "[1]", 400, "object" },
        { "POST", C, "{\"prompt\":\"a\",\"prompt\":\"b\"}", 400, "prompt" },
        { "POST", C, "{\"prompt\":\"\xff\"}", 400, "JSON" },
        { "POST", C, "{\"prompt\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}", 400,
          "deep" },
        { "POST", C, "{}", 400, "prompt" },
        { "POST", C, "{\"prompt\":null}", 400, "prompt" },
        { "POST", C, "{\"prompt\":7}", 400, "prompt" },
        { "POST", C, "{\"prompt\":[]}", 400, "prompt" },
        { "POST", C, "{\"prompt\":[1,99999]}", 400, "token 1" },
        { "POST", C, "{\"prompt\":[[1,-1]]}", 400, "token 1" },
        { "POST", C, "{\"prompt\":[[]]}", 400, "empty" },
        { "POST", C, "{\"prompt\":[\"a\",1]}", 400, "prompt 1" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":\"nobody\"}", 404, "nobody" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":\"No Such\"}", 404, "No Such" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":\"shakespeare@2\"}", 404, "2" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":\"acme/shakespeare\"}", 404, "" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":1}", 400, "model" },
        { "POST", C, "{\"prompt\":\"a\",\"temperature\":\"1\"}", 400, "temperature" },
        { "POST", C, "{\"prompt\":\"a\",\"temperature\":2.1}", 400, "temperature" },
        { "POST", C, "{\"prompt\":\"a\",\"top_p\":1.5}", 400, "top_p" },
        { "POST", C, "{\"prompt\":\"a\",\"top_k\":-2}", 400, "top_k" },
        { "POST", C, "{\"prompt\":\"a\",\"min_p\":2}", 400, "min_p" },
        { "POST", C, "{\"prompt\":\"a\",\"repetition_penalty\":0}", 400, "repetition_penalty" },
        { "POST", C, "{\"prompt\":\"a\",\"presence_penalty\":3}", 400, "presence_penalty" },
        { "POST", C, "{\"prompt\":\"a\",\"frequency_penalty\":-3}", 400, "frequency_penalty" },
        { "POST", C, "{\"prompt\":\"a\",\"max_tokens\":0}", 400, "max_tokens" },
        { "POST", C, "{\"prompt\":\"a\",\"max_tokens\":-1}", 400, "max_tokens" },
        { "POST", C, "{\"prompt\":\"a\",\"max_tokens\":1.5}", 400, "max_tokens" },
        { "POST", C, "{\"prompt\":\"a\",\"n\":0}", 400, "n" },
        { "POST", C, "{\"prompt\":\"a\",\"n\":129}", 400, "n" },
        { "POST", C, "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":60}", 400, "choices" },
        { "POST", C, "{\"prompt\":\"a\",\"stop\":1}", 400, "stop" },
        { "POST", C, "{\"prompt\":\"a\",\"stop\":[\"\"]}", 400, "stop" },
        { "POST", C, "{\"prompt\":\"a\",\"stop\":[1]}", 400, "stop" },
        { "POST", C, "{\"prompt\":\"a\",\"seed\":1.5}", 400, "seed" },
        { "POST", C, "{\"prompt\":\"a\",\"seed\":99999999999999999999}", 400, "JSON" },
        { "POST", C, "{\"prompt\":\"a\",\"logprobs\":21}", 400, "logprobs" },
        { "POST", C, "{\"prompt\":\"a\",\"logprobs\":true}", 400, "logprobs" },
        { "POST", C, "{\"prompt\":\"a\",\"logit_bias\":{\"x\":1}}", 400, "logit_bias" },
        { "POST", C, "{\"prompt\":\"a\",\"logit_bias\":{\"5\":101}}", 400, "token 5" },
        { "POST", C, "{\"prompt\":\"a\",\"logit_bias\":{\"99999\":1}}", 400, "99999" },
        { "POST", C, "{\"prompt\":\"a\",\"logit_bias\":{\"5\":1,\"05\":2}}", 400, "\"05\"" },
        { "POST", C, "{\"prompt\":\"a\",\"n\":1000000000}", 400, "from 1 to 128, not 1000000000" },
        { "POST", C, "{\"prompt\":\"a\",\"stream\":1}", 400, "stream" },
        { "POST", C, "{\"prompt\":\"a\",\"stream_options\":{\"include_usage\":true}}", 400, "stream" },
        { "POST", C, "{\"prompt\":\"a\",\"stream\":true,\"stream_options\":{\"x\":1}}", 400, "`x`" },
        { "POST", C, "{\"prompt\":\"a\",\"suffix\":\"z\"}", 400, "suffix" },
        { "POST", C, "{\"prompt\":\"a\",\"best_of\":2}", 400, "best_of" },
        { "POST", C, "{\"prompt\":\"a\",\"nonsense\":1}", 400, "nonsense" },
        { "POST", C, "{\"prompt\":\"a\",\"messages\":[]}", 400, "messages" },
        { "POST", C, "{\"prompt\":\"a\",\"adapters\":{}}", 400, "adapters" },
        { "POST", C, "{\"prompt\":\"a\",\"adapters\":[{\"weight\":1}]}", 400, "name" },
        { "POST", C, "{\"prompt\":\"a\",\"adapters\":[{\"name\":\"whitman\",\"weight\":\"1\"}]}", 400,
          "weight" },
        { "POST", C, "{\"prompt\":\"a\",\"adapters\":[{\"name\":\"whitman\",\"scale\":1}]}", 400, "scale" },
        { "POST", C, "{\"prompt\":\"a\",\"adapters\":[{\"name\":\"nobody\"}]}", 404, "nobody" },
        { "POST", C, "{\"prompt\":\"a\",\"model\":\"whitman\",\"adapters\":[{\"name\":\"whitman\"}]}", 400,
          "model" },
        /* chat */
        { "POST", CHAT, "{}", 400, "messages" },
        { "POST", CHAT, "{\"messages\":[]}", 400, "messages" },
        { "POST", CHAT, "{\"messages\":[1]}", 400, "messages" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\"}]}", 400, "content" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}", 400, "robot" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"name\":\"x\"}]}", 400, "name" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400,
          "image_url" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{}]}", 400, "tools" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"response_format\":"
          "{\"type\":\"json_object\"}}", 400, "response_format" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"top_logprobs\":2}", 400,
          "logprobs" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"logprobs\":1}", 400,
          "logprobs" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"max_tokens\":1,"
          "\"max_completion_tokens\":2}", 400, "disagree" },
        { "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"audio\":{}}", 400, "audio" },
        { "POST", CHAT, "{\"prompt\":\"a\"}", 400, "prompt" },
        /* tokens */
        { "POST", "/tokenize", "{}", 400, "content" },
        { "POST", "/tokenize", "{\"content\":1}", 400, "content" },
        { "POST", "/tokenize", "{\"content\":\"a\",\"x\":1}", 400, "`x`" },
        { "POST", "/tokenize", "{\"content\":\"a\",\"add_special\":1}", 400, "add_special" },
        { "POST", "/detokenize", "{\"tokens\":\"a\"}", 400, "tokens" },
        { "POST", "/detokenize", "{\"tokens\":[1,100000]}", 400, "[1]" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct serve_resp r;
        call(*state, cases[i].method, cases[i].path, cases[i].body, &r);
        if (r.status != cases[i].status || strstr(serve_message(&r), cases[i].says) == NULL ||
            serve_message(&r)[0] == '\0')
            fail_msg("case %zu, %s %s %s: status %d, \"%s\"", i, cases[i].method, cases[i].path,
                     cases[i].body ? cases[i].body : "", r.status, serve_message(&r));
        json_t *e = json_object_get(r.json, "error");
        assert_non_null(json_object_get(e, "type"));
        assert_non_null(json_object_get(e, "param"));
        assert_non_null(json_object_get(e, "code"));
        serve_resp_free(&r);
    }
}

static void a_wrong_method_says_which_are_right(void **state)
{
    struct serve_resp r;
    call(*state, "POST", "/v1/adapters/shakespeare", NULL, &r);
    assert_int_equal(r.status, 405);
    assert_string_equal(serve_header(&r, "Allow"), "GET, HEAD, PUT, DELETE");
    serve_resp_free(&r);
}

static void fields_that_change_nothing_are_let_pass(void **state)
{
    static const char *const bodies[] = {
        "{\"prompt\":\"a\",\"max_tokens\":1,\"user\":\"u\",\"metadata\":{\"k\":\"v\"},\"store\":true}",
        "{\"prompt\":\"a\",\"max_tokens\":1,\"best_of\":1,\"suffix\":null,\"stop\":null,\"seed\":null,"
        "\"logprobs\":null,\"stream\":null,\"logit_bias\":null,\"response_format\":{\"type\":\"text\"}}",
        "{\"prompt\":\"a\",\"max_tokens\":1,\"top_k\":-1,\"adapters\":[]}",
        "{\"prompt\":\"a\\u0000b\",\"max_tokens\":1}",
    };
    for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
        struct serve_resp r;
        call(*state, "POST", C, bodies[i], &r);
        if (r.status != 200)
            fail_msg("case %zu: %d %s", i, r.status, serve_message(&r));
        serve_resp_free(&r);
    }
    struct serve_resp r;
    call(*state, "POST", CHAT,
         "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":"
         "[{\"type\":\"text\",\"text\":\"hi\"}],\"name\":null}],\"max_completion_tokens\":1,\"tools\":[],"
         "\"tool_choice\":\"none\",\"modalities\":[\"text\"],\"service_tier\":\"auto\"}", &r);
    assert_int_equal(r.status, 200);
    serve_resp_free(&r);
}

/* --- models and adapters --------------------------------------------------------------------------- */

static void models_are_the_base_and_the_adapters(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    call(s, "GET", "/v1/models", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "data.0.id"), s->base->name);
    assert_string_equal(text_at(&r, "data.1.id"), "shakespeare");
    assert_string_equal(text_at(&r, "data.1.parent"), s->base->name);
    assert_string_equal(text_at(&r, "data.1.root"), "shakespeare@1");
    assert_string_equal(text_at(&r, "data.2.id"), "whitman");
    assert_string_equal(text_at(&r, "data.2.owned_by"), "default");
    assert_int_equal(int_at(&r, "data.2.max_model_len"), 512);
    assert_null(at(&r, "data.3"));
    serve_resp_free(&r);
    static const char *const same[] = { "/v1/models/whitman", "/v1/models/whitman@1",
                                        "/v1/models/default/whitman" };
    for (size_t i = 0; i < 3; i++) {
        call(s, "GET", same[i], NULL, &r);
        assert_int_equal(r.status, 200);
        assert_string_equal(text_at(&r, "id"), same[i] + 11);
        assert_string_equal(text_at(&r, "root"), "whitman@1");
        serve_resp_free(&r);
    }
}

static void an_adapter_shows_its_ranks_and_what_pruning_left(void **state)
{
    struct serve_resp r;
    call(*state, "GET", "/v1/adapters/whitman", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "method"), "adalora");
    assert_int_equal(int_at(&r, "pruning.init_r"), 16);
    assert_int_equal(int_at(&r, "pruning.target_r"), 10);
    assert_int_equal(int_at(&r, "module_count"), (json_int_t)json_array_size(at(&r, "modules")));
    /* target_r 10 of 16 on average, over all modules */
    assert_int_equal(int_at(&r, "pruning.triplets_kept"), 10 * int_at(&r, "module_count"));
    assert_int_equal(int_at(&r, "pruning.triplets_initial"), 16 * int_at(&r, "module_count"));
    assert_int_equal((json_int_t)json_array_size(at(&r, "modules.0.kept")),
                     int_at(&r, "modules.0.rank"));
    assert_true(json_is_true(at(&r, "base.claimed")));
    assert_true(json_is_true(at(&r, "base.served_here")));
    assert_string_equal(text_at(&r, "config.peft_type"), "ADALORA");
    serve_resp_free(&r);
}

static void two_adapters_are_compared_and_a_version_is_like_itself(void **state)
{
    struct serve_resp r;
    call(*state, "GET", "/v1/adapters/whitman/diff?with=whitman@1", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_float_equal(json_number_value(at(&r, "diff")), 0, 0);
    assert_float_equal(json_number_value(at(&r, "cosine")), 1, 1e-12);
    serve_resp_free(&r);
    call(*state, "GET", "/v1/adapters/shakespeare/diff?with=whitman", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "adapters.1"), "whitman@1");
    assert_true(json_is_true(at(&r, "same_base")));
    const double a = json_number_value(at(&r, "norm.0")), b = json_number_value(at(&r, "norm.1"));
    const double d = json_number_value(at(&r, "diff")), cosine = json_number_value(at(&r, "cosine"));
    assert_float_equal(d * d, a * a + b * b - 2 * a * b * cosine, 1e-6 * d * d);
    /* pruned to nothing: no direction to compare */
    assert_int_equal(int_at(&r, "modules.1.rank.1"), 0);
    assert_true(json_is_null(at(&r, "modules.1.cosine")));
    serve_resp_free(&r);
}

static void the_list_is_paged_by_name(void **state)
{
    struct serve_resp r;
    call(*state, "GET", "/v1/adapters?limit=1", NULL, &r);
    assert_int_equal((int)json_array_size(at(&r, "data")), 1);
    assert_string_equal(text_at(&r, "last_id"), "shakespeare@1");
    assert_true(json_is_true(at(&r, "has_more")));
    serve_resp_free(&r);
    call(*state, "GET", "/v1/adapters?limit=1&after=shakespeare@1", NULL, &r);
    assert_string_equal(text_at(&r, "data.0.name"), "whitman");
    assert_false(json_is_true(at(&r, "has_more")));
    serve_resp_free(&r);
    call(*state, "GET", "/v1/adapters?after=whitman", NULL, &r);
    assert_int_equal((int)json_array_size(at(&r, "data")), 0);
    assert_true(json_is_null(at(&r, "first_id")));
    serve_resp_free(&r);
}

/* A form with the demo's files; the spool of `weights` is the caller's. */
static void upload(struct serve *s, const char *name, const char *activate, const char *folder,
                   struct serve_resp *ret)
{
    char path[200], *config, *weights;
    size_t nconfig, nweights;
    struct err err = { 0 };
    struct spool *spool;
    snprintf(path, sizeof path, DEMO "/adapters/%s/adapter_config.json", folder);
    assert_int_equal(file_read(path, 1 << 20, &config, &nconfig, &err), ERR_OK);
    snprintf(path, sizeof path, DEMO "/adapters/%s/adapter_model.safetensors", folder);
    assert_int_equal(file_read(path, 1 << 24, &weights, &nweights, &err), ERR_OK);
    assert_int_equal(spool_open(s->db_path, 1 << 24, &spool, &err), ERR_OK);
    assert_int_equal(spool_write(spool, weights, nweights, &err), ERR_OK);
    struct api_part parts[] = {
        { .name = "name", .value = (char *)(uintptr_t)name, .len = strlen(name) },
        { .name = "config", .value = config, .len = nconfig },
        { .name = "weights", .spool = spool },
        { .name = "activate", .value = (char *)(uintptr_t)activate,
          .len = activate ? strlen(activate) : 0 },
    };
    const struct serve_req r = { .method = "POST", .path = "/v1/adapters",
                                 .headers = { "Content-Type: multipart/form-data; boundary=x" },
                                 .parts = parts, .nparts = activate ? 4 : 3 };
    serve_call(s, &r, ret);
    spool_close(spool);
    free(config);
    free(weights);
}

static void uploads_make_versions_and_the_same_bytes_make_none(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    upload(s, "poet", NULL, "shakespeare", &r);
    assert_int_equal(r.status, 201);
    assert_string_equal(text_at(&r, "id"), "poet@1");
    assert_true(json_is_true(at(&r, "live")));
    assert_string_equal(serve_header(&r, "Location"), "/v1/adapters/poet@1");
    serve_resp_free(&r);
    upload(s, "poet", NULL, "shakespeare", &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "id"), "poet@1");
    serve_resp_free(&r);
    upload(s, "poet", "false", "whitman", &r);
    assert_int_equal(r.status, 201);
    assert_string_equal(text_at(&r, "id"), "poet@2");
    assert_false(json_is_true(at(&r, "live")));
    serve_resp_free(&r);
    call(s, "POST", "/v1/adapters/poet/promote", "{\"version\":2}", &r);
    assert_int_equal(r.status, 200);
    assert_true(json_is_true(at(&r, "live")));
    serve_resp_free(&r);
    call(s, "GET", "/v1/models/poet", NULL, &r);
    assert_string_equal(text_at(&r, "root"), "poet@2");
    serve_resp_free(&r);
    call(s, "GET", "/v1/adapters/poet/versions", NULL, &r);
    assert_int_equal((int)json_array_size(at(&r, "data")), 2);
    serve_resp_free(&r);
    call(s, "DELETE", "/v1/adapters/poet@1", NULL, &r);
    assert_int_equal(r.status, 200);
    serve_resp_free(&r);
    call(s, "DELETE", "/v1/adapters/poet", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_true(json_is_true(at(&r, "deleted")));
    serve_resp_free(&r);
    call(s, "GET", "/v1/adapters/poet", NULL, &r);
    assert_int_equal(r.status, 404);
    serve_resp_free(&r);
    assert_int_equal(serve_spooled(s), 0);
}

static void forms_with_wrong_parts_are_refused_by_name(void **state)
{
    static char one[] = "x", truth[] = "maybe", base[] = "demo-base", bad[] = "No Name", empty[] = "";
    struct { struct api_part parts[4]; size_t n; int status; const char *says; } cases[] = {
        { { { .name = "name", .value = one, .len = 1 } }, 1, 400, "config" },
        { { { .name = "config", .value = one, .len = 1 } }, 1, 400, "name" },
        { { { .name = "name", .value = one, .len = 1 }, { .name = "config", .value = one, .len = 1 } }, 2,
          400, "weights" },
        { { { .name = "name", .value = one, .len = 1 }, { .name = "name", .value = one, .len = 1 } }, 2, 400,
          "more than one part `name`" },
        { { { .name = "colour", .value = one, .len = 1 } }, 1, 400, "colour" },
        { { { .name = "name", .value = one, .len = 1 }, { .name = "config", .value = one, .len = 1 },
            { .name = "weights" }, { .name = "activate", .value = truth, .len = 5 } }, 4, 400, "activate" },
        { { { .name = "name", .value = base, .len = 9 }, { .name = "config", .value = one, .len = 1 },
            { .name = "weights" } }, 3, 409, "base" },
        { { { .name = "name", .value = bad, .len = 7 }, { .name = "config", .value = one, .len = 1 },
            { .name = "weights" } }, 3, 400, "No Name" },
        { { { .name = "name", .value = one, .len = 1 }, { .name = "config", .value = empty, .len = 0 },
            { .name = "weights" } }, 3, 400, "adapter_config.json is empty" },
        { { { .name = "name", .value = one, .len = 1 }, { .name = "config", .value = one, .len = 1 },
            { .name = "weights" } }, 3, 400, "weights are empty" },
    };
    struct serve *s = *state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct err err = { 0 };
        struct spool *spool;
        assert_int_equal(spool_open(s->db_path, 1 << 20, &spool, &err), ERR_OK);
        for (size_t k = 0; k < cases[i].n; k++)
            if (strcmp(cases[i].parts[k].name, "weights") == 0)
                cases[i].parts[k].spool = spool;
        const struct serve_req req = { .method = "POST", .path = "/v1/adapters",
                                       .headers = { "Content-Type: multipart/form-data; boundary=x" },
                                       .parts = cases[i].parts, .nparts = cases[i].n };
        struct serve_resp r;
        serve_call(s, &req, &r);
        spool_close(spool);
        if (r.status != cases[i].status || strstr(serve_message(&r), cases[i].says) == NULL)
            fail_msg("case %zu: %d \"%s\"", i, r.status, serve_message(&r));
        serve_resp_free(&r);
    }
}

/* A ustar header by hand (POSIX.1-1988), so that odd entries can be made. */
static void tar_entry(struct buf *b, const char *name, char type, const char *data, size_t len)
{
    char h[512] = { 0 };
    snprintf(h, 100, "%s", name);
    memcpy(h + 100, "0000644", 8);
    memcpy(h + 108, "0000000", 8);
    memcpy(h + 116, "0000000", 8);
    snprintf(h + 124, 12, "%011zo", len);
    memcpy(h + 136, "00000000000", 12);
    memset(h + 148, ' ', 8);
    h[156] = type;
    if (type == '2')
        snprintf(h + 157, 100, "/etc/passwd");
    memcpy(h + 257, "ustar\00000", 8);
    unsigned sum = 0;
    for (int i = 0; i < 512; i++)
        sum += (unsigned char)h[i];
    snprintf(h + 148, 8, "%06o", sum);
    buf_add(b, h, 512);
    buf_add(b, data, len);
    static const char zero[512];
    buf_add(b, zero, (512 - len % 512) % 512);
}

static void put_tar(struct serve *s, const char *name, const struct buf *b, struct serve_resp *ret)
{
    struct err err = { 0 };
    struct spool *spool;
    char path[100];
    snprintf(path, sizeof path, "/v1/adapters/%s", name);
    assert_int_equal(spool_open(s->db_path, 1 << 26, &spool, &err), ERR_OK);
    assert_int_equal(spool_write(spool, b->data ? b->data : "", b->len, &err), ERR_OK);
    const struct serve_req req = { .method = "PUT", .path = path, .upload = spool };
    serve_call(s, &req, ret);
    spool_close(spool);
}

static void tar_files_with_odd_entries_are_refused_by_name(void **state)
{
    struct serve *s = *state;
    static const struct { const char *name; char type; const char *says; } cases[] = {
        { "../adapter_config.json", '0', "folder" },
        { "/adapter_config.json", '0', "folder" },
        { "sub/adapter_config.json", '0', "folder" },
        { "adapter_config.json", '2', "plain file" },
        { "adapter_config.json", '3', "plain file" },
        { "sub", '5', "plain file" },
        { "adapter_model.bin", '0', "no adapter_config.json" },
        { "adapter_model.pt", '0', "adapter_model.pt" },
        { "tokenizer.json", '0', "tokenizer.json" },
        { "README.md", '0', "no adapter_config.json" },
        { "adapter_config.json", '0', "no adapter_model.safetensors" },
        { "./adapter_config.json", '0', "no adapter_model.safetensors" },
    };
    static const char end[1024];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf b;
        struct serve_resp r;
        buf_init(&b, 1 << 20);
        tar_entry(&b, cases[i].name, cases[i].type, "{}", cases[i].type == '0' ? 2 : 0);
        buf_add(&b, end, sizeof end);
        put_tar(s, "odd", &b, &r);
        if (r.status != 400 || strstr(serve_message(&r), cases[i].says) == NULL)
            fail_msg("case %zu: %d \"%s\"", i, r.status, serve_message(&r));
        serve_resp_free(&r);
        buf_free(&b);
    }
    struct buf b;
    struct serve_resp r;
    buf_init(&b, 1 << 20);
    put_tar(s, "odd", &b, &r);
    assert_int_equal(r.status, 400);
    serve_resp_free(&r);
    buf_puts(&b, "this is not a tar file at all");
    put_tar(s, "odd", &b, &r);
    assert_int_equal(r.status, 400);
    serve_resp_free(&r);
    b.len = 0;
    tar_entry(&b, "adapter_config.json", '0', "{}", 2);
    tar_entry(&b, "adapter_config.json", '0', "{}", 2);
    put_tar(s, "odd", &b, &r);
    assert_non_null(strstr(serve_message(&r), "twice"));
    serve_resp_free(&r);
    b.len -= 700; /* cut in the middle */
    put_tar(s, "odd", &b, &r);
    assert_int_equal(r.status, 400);
    serve_resp_free(&r);
    buf_free(&b);
    assert_int_equal(serve_spooled(s), 0);
}

static void a_download_goes_back_in_as_the_same_version(void **state)
{
    struct serve *s = *state;
    struct serve_resp down, up;
    call(s, "GET", "/v1/adapters/whitman/download", NULL, &down);
    assert_int_equal(down.status, 200);
    const struct buf b = { .data = down.text, .len = down.len };
    put_tar(s, "whitman", &b, &up);
    assert_int_equal(up.status, 200); /* the same content: nothing new */
    assert_string_equal(text_at(&up, "id"), "whitman@1");
    serve_resp_free(&up);
    serve_resp_free(&down);
    assert_int_equal(serve_spooled(s), 0);
}

/* --- generations ------------------------------------------------------------------------------------- */

static void a_completion_has_openais_shape_and_says_how_to_replay_it(void **state)
{
    struct serve *s = *state;
    struct serve_resp r, again;
    call(s, "POST", C, "{\"model\":\"shakespeare\",\"prompt\":\"My lord,\",\"max_tokens\":8}", &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "object"), "text_completion");
    assert_string_equal(text_at(&r, "model"), "shakespeare");
    assert_string_equal(text_at(&r, "lorad.adapters.0.id"), "shakespeare@1");
    assert_string_equal(text_at(&r, "lorad.base_sha256"), s->base->hash_hex);
    assert_string_equal(text_at(&r, "lorad.precision"), "fast");
    assert_string_equal(serve_header(&r, "X-Lorad-Base"), s->base->hash_hex);
    assert_string_equal(serve_header(&r, "X-Lorad-Precision"), "fast");
    assert_non_null(strstr(serve_header(&r, "X-Lorad-Adapter"), "shakespeare@1 "));
    assert_int_equal(int_at(&r, "usage.total_tokens"),
                     int_at(&r, "usage.prompt_tokens") + int_at(&r, "usage.completion_tokens"));
    assert_true(int_at(&r, "usage.completion_tokens") <= 8);
    char body[200];
    snprintf(body, sizeof body, "{\"model\":\"shakespeare@1\",\"prompt\":\"My lord,\",\"max_tokens\":8,"
             "\"seed\":%s}", serve_header(&r, "X-Lorad-Seed"));
    call(s, "POST", C, body, &again);
    assert_string_equal(text_at(&again, "choices.0.text"), text_at(&r, "choices.0.text"));
    assert_string_equal(text_at(&again, "system_fingerprint"), text_at(&r, "system_fingerprint"));
    serve_resp_free(&r);
    serve_resp_free(&again);
}

/* All texts of choice `index` in a stream, joined; the last finish_reason. */
static void join_stream(const struct serve_resp *r, int index, bool chat, struct buf *text,
                        char finish[16], int *ret_events)
{
    finish[0] = '\0';
    *ret_events = 0;
    for (const char *p = r->text; (p = strstr(p, "data: ")) != NULL;) {
        p += 6;
        const char *end = strstr(p, "\n\n");
        assert_non_null(end);
        if (strncmp(p, "[DONE]", 6) == 0)
            break;
        json_t *j = json_loadb(p, (size_t)(end - p), 0, NULL);
        assert_non_null(j);
        json_t *ch = json_array_get(json_object_get(j, "choices"), 0);
        if (ch != NULL && json_integer_value(json_object_get(ch, "index")) == index) {
            const char *t = json_string_value(
                chat ? json_object_get(json_object_get(ch, "delta"), "content")
                     : json_object_get(ch, "text"));
            const char *f = json_string_value(json_object_get(ch, "finish_reason"));
            buf_puts(text, t ? t : "");
            if (f != NULL)
                snprintf(finish, 16, "%s", f);
            ++*ret_events;
        }
        json_decref(j);
        p = end;
    }
}

static void a_stream_says_the_same_as_the_answer_in_one_piece(void **state)
{
    struct serve *s = *state;
    static const char *const fields =
        "\"n\":2,\"seed\":7,\"max_tokens\":24,\"temperature\":0.8,\"ignore_eos\":true";
    for (int chat = 0; chat < 2; chat++) {
        const char *path = chat ? CHAT : C;
        const char *what = chat ? "\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]"
                                : "\"prompt\":\"It was a dark night\"";
        char body[400];
        struct serve_resp whole, stream;
        snprintf(body, sizeof body, "{%s,%s}", what, fields);
        call(s, "POST", path, body, &whole);
        assert_int_equal(whole.status, 200);
        snprintf(body, sizeof body, "{%s,%s,\"stream\":true,\"stream_options\":{\"include_usage\":true}}",
                 what, fields);
        call(s, "POST", path, body, &stream);
        assert_int_equal(stream.status, 200);
        assert_non_null(strstr(stream.text, "data: [DONE]\n\n"));
        assert_non_null(strstr(stream.text, "\"choices\":[]"));
        for (int i = 0; i < 2; i++) {
            struct buf text;
            char finish[16], at_path[40];
            int events;
            buf_init(&text, 1 << 20);
            join_stream(&stream, i, chat, &text, finish, &events);
            snprintf(at_path, sizeof at_path, chat ? "choices.%d.message.content" : "choices.%d.text", i);
            assert_string_equal(text.data ? text.data : "", text_at(&whole, at_path));
            snprintf(at_path, sizeof at_path, "choices.%d.finish_reason", i);
            assert_string_equal(finish, text_at(&whole, at_path));
            assert_true(events >= 2); /* text and end, at least */
            buf_free(&text);
        }
        assert_string_not_equal(text_at(&whole, chat ? "choices.0.message.content" : "choices.0.text"),
                                text_at(&whole, chat ? "choices.1.message.content" : "choices.1.text"));
        serve_resp_free(&whole);
        serve_resp_free(&stream);
    }
}

static void a_chat_stream_begins_with_the_role_and_ends_with_the_reason(void **state)
{
    struct serve_resp r;
    call(*state, "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}],\"stream\":true,"
         "\"max_tokens\":3}", &r);
    const char *first = strstr(r.text, "data: ");
    assert_ptr_equal(first, r.text);
    const char *end = strstr(first, "\n\n");
    json_t *j = json_loadb(first + 6, (size_t)(end - first) - 6, 0, NULL);
    json_t *delta = json_object_get(json_array_get(json_object_get(j, "choices"), 0), "delta");
    assert_string_equal(json_string_value(json_object_get(delta, "role")), "assistant");
    assert_string_equal(json_string_value(json_object_get(delta, "content")), "");
    assert_string_equal(json_string_value(json_object_get(j, "object")), "chat.completion.chunk");
    json_decref(j);
    const char *last = strstr(r.text, "\"finish_reason\":\"");
    assert_non_null(last);
    assert_non_null(strstr(last, "data: [DONE]\n\n"));
    serve_resp_free(&r);
}

static void logprobs_come_in_the_shape_of_each_route(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    call(s, "POST", C, "{\"prompt\":\"Once upon\",\"max_tokens\":4,\"logprobs\":2,\"temperature\":0,"
         "\"echo\":true,\"ignore_eos\":true}", &r);
    assert_int_equal(r.status, 200);
    const size_t n = json_array_size(at(&r, "choices.0.logprobs.tokens"));
    assert_int_equal((json_int_t)n, int_at(&r, "usage.total_tokens"));
    assert_int_equal(json_array_size(at(&r, "choices.0.logprobs.token_logprobs")), n);
    assert_int_equal(json_array_size(at(&r, "choices.0.logprobs.top_logprobs")), n);
    assert_int_equal(json_array_size(at(&r, "choices.0.logprobs.text_offset")), n);
    assert_true(json_is_null(at(&r, "choices.0.logprobs.token_logprobs.0")));
    for (size_t i = 1; i < n; i++)
        assert_true(json_real_value(json_array_get(at(&r, "choices.0.logprobs.token_logprobs"), i)) <= 0);
    assert_memory_equal(text_at(&r, "choices.0.text"), "Once upon", 9);
    serve_resp_free(&r);

    call(s, "POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"max_tokens\":4,"
         "\"logprobs\":true,\"top_logprobs\":3,\"temperature\":0,\"ignore_eos\":true}", &r);
    assert_int_equal(r.status, 200);
    assert_int_equal(json_array_size(at(&r, "choices.0.logprobs.content")), 4);
    assert_int_equal(json_array_size(at(&r, "choices.0.logprobs.content.0.top_logprobs")), 3);
    /* Greedy: the token taken is the first of the alternatives. */
    assert_true(json_equal(at(&r, "choices.0.logprobs.content.0.logprob"),
                           at(&r, "choices.0.logprobs.content.0.top_logprobs.0.logprob")));
    serve_resp_free(&r);

    call(s, "POST", C, "{\"prompt\":\"Once upon\",\"max_tokens\":0,\"echo\":true,\"logprobs\":1}", &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "choices.0.text"), "Once upon");
    assert_int_equal(int_at(&r, "usage.completion_tokens"), 0);
    assert_int_equal((json_int_t)json_array_size(at(&r, "choices.0.logprobs.tokens")),
                     int_at(&r, "usage.prompt_tokens"));
    serve_resp_free(&r);
}

static void prompts_may_be_texts_or_tokens_one_or_many(void **state)
{
    struct serve *s = *state;
    struct serve_resp tok, a, b, c;
    call(s, "POST", "/tokenize", "{\"content\":\"It was a dark night\",\"add_special\":true}", &tok);
    char *ids = json_dumps(at(&tok, "tokens"), JSON_COMPACT), body[600];
    call(s, "POST", C, "{\"prompt\":\"It was a dark night\",\"temperature\":0,\"max_tokens\":8}", &a);
    snprintf(body, sizeof body, "{\"prompt\":%s,\"temperature\":0,\"max_tokens\":8}", ids);
    call(s, "POST", C, body, &b);
    snprintf(body, sizeof body, "{\"prompt\":[%s,%s],\"temperature\":0,\"max_tokens\":8,\"n\":2}", ids, ids);
    call(s, "POST", C, body, &c);
    assert_int_equal(a.status, 200);
    assert_int_equal(c.status, 200);
    assert_string_equal(text_at(&a, "choices.0.text"), text_at(&b, "choices.0.text"));
    assert_int_equal(json_array_size(at(&c, "choices")), 4);
    assert_string_equal(text_at(&a, "choices.0.text"), text_at(&c, "choices.3.text"));
    assert_int_equal(int_at(&c, "choices.3.index"), 3);
    assert_int_equal(int_at(&c, "usage.prompt_tokens"), 2 * int_at(&a, "usage.prompt_tokens"));
    free(ids);
    serve_resp_free(&tok);
    serve_resp_free(&a);
    serve_resp_free(&b);
    serve_resp_free(&c);
}

static void a_stop_string_ends_the_text_before_it(void **state)
{
    struct serve *s = *state;
    struct serve_resp whole, cut;
    call(s, "POST", C, "{\"prompt\":\"It was a dark night\",\"temperature\":0,\"max_tokens\":40,"
         "\"ignore_eos\":true}", &whole);
    const char *text = text_at(&whole, "choices.0.text");
    assert_true(strlen(text) > 20);
    char stop[4] = { text[12], text[13], text[14], 0 };
    json_t *req = json_pack("{s:s, s:i, s:i, s:[s], s:b}", "prompt", "It was a dark night", "temperature", 0,
                            "max_tokens", 40, "stop", stop, "ignore_eos", 1);
    char *body = json_dumps(req, 0);
    call(s, "POST", C, body, &cut);
    assert_int_equal(cut.status, 200);
    const size_t n = (size_t)(strstr(text, stop) - text);
    assert_int_equal(strlen(text_at(&cut, "choices.0.text")), n);
    assert_memory_equal(text_at(&cut, "choices.0.text"), text, n);
    assert_string_equal(text_at(&cut, "choices.0.finish_reason"), "stop");
    free(body);
    json_decref(req);
    serve_resp_free(&whole);
    serve_resp_free(&cut);
}

static void adapters_with_weights_are_combined(void **state)
{
    struct serve *s = *state;
    struct serve_resp alone, zero, base, both;
#define REST "\"prompt\":\"My lord,\",\"temperature\":0,\"max_tokens\":16"
    call(s, "POST", C, "{\"model\":\"whitman\"," REST "}", &alone);
    call(s, "POST", C, "{\"adapters\":[{\"name\":\"whitman\"}]," REST "}", &both);
    assert_string_equal(text_at(&alone, "choices.0.text"), text_at(&both, "choices.0.text"));
    serve_resp_free(&both);
    call(s, "POST", C, "{" REST "}", &base);
    call(s, "POST", C, "{\"adapters\":[{\"name\":\"whitman\",\"weight\":0}]," REST "}", &zero);
    assert_string_equal(text_at(&base, "choices.0.text"), text_at(&zero, "choices.0.text"));
    assert_string_not_equal(text_at(&base, "choices.0.text"), text_at(&alone, "choices.0.text"));
    assert_string_equal(text_at(&base, "model"), s->base->name);
    call(s, "POST", C, "{\"model\":\"demo-base\",\"adapters\":[{\"name\":\"whitman\",\"weight\":0.5},"
         "{\"name\":\"shakespeare@1\",\"weight\":0.5}]," REST "}", &both);
    assert_int_equal(both.status, 200);
    assert_int_equal(json_array_size(at(&both, "lorad.adapters")), 2);
    serve_resp_free(&alone);
    serve_resp_free(&zero);
    serve_resp_free(&base);
    serve_resp_free(&both);
}

static void a_prompt_that_is_too_long_names_both_numbers(void **state)
{
    struct serve_resp r;
    struct buf b;
    buf_init(&b, 1 << 20);
    buf_puts(&b, "{\"prompt\":[1");
    for (int i = 0; i < 600; i++)
        buf_puts(&b, ",5");
    buf_puts(&b, "]}");
    call(*state, "POST", C, b.data, &r);
    assert_int_equal(r.status, 400);
    assert_string_equal(text_at(&r, "error.code"), "context_length_exceeded");
    assert_non_null(strstr(serve_message(&r), "601"));
    assert_non_null(strstr(serve_message(&r), "512"));
    buf_free(&b);
    serve_resp_free(&r);
}

static void an_adapter_of_another_base_is_refused_when_used(void **state)
{
    struct serve *s = *state;
    struct err err = { 0 };
    struct adapter_src *src;
    char other[65];
    memset(other, 'a', 64);
    other[64] = '\0';
    assert_int_equal(peft_load_dir(&s->base->arch, DEMO_ADAPTER("shakespeare"), &src, &err), ERR_OK);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = other, .origin = "train" };
    struct store_version v;
    bool is_new;
    assert_int_equal(store_adapter_put(s->st, 1, "foreign", src, &o, &v, &is_new, &err), ERR_OK);
    store_version_free(&v);
    adapter_src_free(src);
    struct serve_resp r;
    call(s, "POST", C, "{\"model\":\"foreign\",\"prompt\":\"a\"}", &r);
    assert_int_equal(r.status, 409);
    assert_string_equal(text_at(&r, "error.code"), "base_mismatch");
    assert_non_null(strstr(serve_message(&r), "aaaaaaaaaaaa"));
    serve_resp_free(&r);
    assert_int_equal(store_adapter_delete(s->st, 1, "foreign", &err), ERR_OK);
}

static void tokens_go_there_and_back(void **state)
{
    struct serve *s = *state;
    struct serve_resp r, back;
    call(s, "POST", "/tokenize", "{\"content\":\"It was \xc3\xa9t\xc3\xa9\",\"with_pieces\":true}", &r);
    assert_int_equal(r.status, 200);
    assert_true(json_is_integer(at(&r, "tokens.0.id")));
    serve_resp_free(&r);
    static const char *const keys[] = { "content", "prompt", "text" };
    for (int i = 0; i < 3; i++) {
        char body[200];
        snprintf(body, sizeof body, "{\"%s\":\"It was \xc3\xa9t\xc3\xa9\"}", keys[i]);
        call(s, "POST", "/tokenize", body, &r);
        char *ids = json_dumps(at(&r, "tokens"), 0);
        snprintf(body, sizeof body, "{\"tokens\":%s}", ids);
        call(s, "POST", "/detokenize", body, &back);
        assert_string_equal(text_at(&back, "content"), "It was \xc3\xa9t\xc3\xa9");
        free(ids);
        serve_resp_free(&r);
        serve_resp_free(&back);
    }
}

/* --- keys ---------------------------------------------------------------------------------------------- */

static void web_pages_elsewhere_cannot_use_a_server_without_keys(void **state)
{
    static const struct { const char *method, *host, *origin; int status; } cases[] = {
        { "POST", "Host: localhost:8080", NULL, 200 },
        { "POST", "Host: 127.0.0.1", NULL, 200 },
        { "POST", "Host: [::1]:8080", NULL, 200 },
        { "POST", "Host: evil.example", NULL, 403 },
        { "GET", "Host: evil.example:8080", NULL, 403 },
        { "POST", "Host: 127.0.0.1.evil.example", NULL, 403 },
        { "POST", "Host: localhost:8080", "Origin: http://localhost:8080", 200 },
        { "POST", "Host: localhost:8080", "Origin: http://localhost:9090", 403 },
        { "POST", "Host: localhost:8080", "Origin: https://evil.example", 403 },
        { "POST", "Host: localhost:8080", "Origin: null", 403 },
        { "GET", "Host: localhost:8080", "Origin: https://evil.example", 405 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct serve_req req = { .method = cases[i].method, .path = "/tokenize",
                                       .body = "{\"content\":\"a\"}",
                                       .headers = { cases[i].host, cases[i].origin } };
        struct serve_resp r;
        serve_call(*state, &req, &r);
        if (r.status != cases[i].status)
            fail_msg("case %zu: %d \"%s\"", i, r.status, serve_message(&r));
        serve_resp_free(&r);
    }
}

static void with_keys_each_tenant_sees_its_own_and_nothing_else(void **state)
{
    (void)state;
    struct serve *s = serve_open(NULL);
    struct err err = { 0 };
    int64_t acme, umbrella, id;
    char key_a[STORE_KEY_LEN + 1], key_u[STORE_KEY_LEN + 1], head_a[100], head_u[100], head_x[100];
    struct serve_resp r, none;
    call(s, "GET", "/v1/models", NULL, &r);
    assert_int_equal(r.status, 200); /* no keys yet */
    serve_resp_free(&r);
    assert_int_equal(store_tenant_add(s->st, "acme", &acme, &err), ERR_OK);
    assert_int_equal(store_tenant_add(s->st, "umbrella", &umbrella, &err), ERR_OK);
    assert_int_equal(store_key_create(s->st, acme, "a", key_a, &id, &err), ERR_OK);
    assert_int_equal(store_key_create(s->st, umbrella, "u", key_u, &id, &err), ERR_OK);
    serve_add_adapter(s, acme, "secret", DEMO_ADAPTER("shakespeare"));
    snprintf(head_a, sizeof head_a, "Authorization: Bearer %s", key_a);
    snprintf(head_u, sizeof head_u, "x-api-key: %s", key_u);
    snprintf(head_x, sizeof head_x, "Authorization: Bearer %.48sX", key_a);

    call(s, "GET", "/v1/models", NULL, &r); /* noticed without a restart */
    assert_int_equal(r.status, 401);
    assert_string_equal(text_at(&r, "error.code"), "invalid_api_key");
    serve_resp_free(&r);
    static const char *const routes[][2] = {
        { "GET", "/v1/models" }, { "GET", "/v1/models/secret" }, { "POST", C }, { "POST", CHAT },
        { "POST", "/tokenize" }, { "POST", "/detokenize" }, { "GET", "/v1/adapters" },
        { "POST", "/v1/adapters" }, { "GET", "/v1/adapters/secret" }, { "PUT", "/v1/adapters/secret" },
        { "DELETE", "/v1/adapters/secret" }, { "GET", "/v1/adapters/secret/versions" },
        { "GET", "/v1/adapters/secret/download" }, { "POST", "/v1/adapters/secret/promote" },
    };
    for (size_t i = 0; i < sizeof routes / sizeof routes[0]; i++) {
        const char *const bad[] = { NULL, head_x, "Authorization: Basic abc", "Authorization: Bearer" };
        for (int k = 0; k < 4; k++) {
            const struct serve_req q = { .method = routes[i][0], .path = routes[i][1],
                                         .headers = { bad[k] } };
            serve_call(s, &q, &r);
            if (r.status != 401)
                fail_msg("%s %s with \"%s\": %d", routes[i][0], routes[i][1], bad[k] ? bad[k] : "", r.status);
            serve_resp_free(&r);
        }
    }
    for (int i = 0; i < 2; i++) {
        const struct serve_req q = { .method = "GET", .path = i ? "/" : "/health",
                                     .headers = { "Host: any.example" } };
        serve_call(s, &q, &r);
        assert_int_equal(r.status, 200);
        serve_resp_free(&r);
    }
    const struct serve_req own = { .method = "GET", .path = "/v1/adapters/secret", .headers = { head_a } };
    serve_call(s, &own, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "tenant"), "acme");
    serve_resp_free(&r);

    /* Somebody else's adapter and one that does not exist: the same words but for the name. */
    static const struct { const char *method, *path, *body; } peek[] = {
        { "GET", "/v1/models/%s", NULL }, { "GET", "/v1/models/acme/%s", NULL },
        { "GET", "/v1/adapters/%s", NULL }, { "GET", "/v1/adapters/%s@1", NULL },
        { "GET", "/v1/adapters/acme/%s", NULL }, { "GET", "/v1/adapters/%s/versions", NULL },
        { "GET", "/v1/adapters/%s/download", NULL }, { "DELETE", "/v1/adapters/%s", NULL },
        { "DELETE", "/v1/adapters/%s@1", NULL }, { "POST", "/v1/adapters/%s@1/promote", NULL },
        { "DELETE", "/v1/adapters/acme/%s", NULL },
        { "POST", C, "{\"model\":\"%s\",\"prompt\":\"a\"}" },
        { "POST", C, "{\"model\":\"acme/%s\",\"prompt\":\"a\"}" },
        { "POST", C, "{\"adapters\":[{\"name\":\"%s\"}],\"prompt\":\"a\"}" },
    };
    for (size_t i = 0; i < sizeof peek / sizeof peek[0]; i++) {
        char path[2][100], body[2][100];
        static const char *const names[2] = { "secret", "absent" };
        struct serve_resp *both[2] = { &r, &none };
        for (int k = 0; k < 2; k++) {
            char *spot;
            snprintf(path[k], 100, "%s", peek[i].path);
            snprintf(body[k], 100, "%s", peek[i].body ? peek[i].body : "");
            if ((spot = strstr(path[k], "%s")) != NULL) {
                memmove(spot + 6, spot + 2, strlen(spot + 2) + 1);
                memcpy(spot, names[k], 6);
            }
            if ((spot = strstr(body[k], "%s")) != NULL) {
                memmove(spot + 6, spot + 2, strlen(spot + 2) + 1);
                memcpy(spot, names[k], 6);
            }
            const struct serve_req q = { .method = peek[i].method, .path = path[k],
                                         .body = peek[i].body ? body[k] : NULL, .headers = { head_u } };
            serve_call(s, &q, both[k]);
        }
        assert_int_equal(r.status, 404);
        assert_int_equal(none.status, 404);
        char *word;
        while ((word = strstr(r.text, "secret")) != NULL)
            memcpy(word, "absent", 6);
        assert_string_equal(r.text, none.text);
        serve_resp_free(&r);
        serve_resp_free(&none);
    }
    serve_close(s);
}

static void a_server_that_others_can_reach_needs_a_key_even_when_there_is_none(void **state)
{
    (void)state;
    const struct serve_opts o = { .open_to_all = true };
    struct serve *s = serve_open(&o);
    struct serve_resp r;
    call(s, "GET", "/v1/models", NULL, &r);
    assert_int_equal(r.status, 401);
    serve_resp_free(&r);
    serve_close(s);
}

/* --- pressure ---------------------------------------------------------------------------------------------- */

static sem_t gate;

/* The engine stands still here until the gate is opened. */
static void hold(void *ud)
{
    (void)ud;
    sem_wait(&gate);
    sem_post(&gate);
}

/* One sequence that runs, and does not end before the gate is open, and one that waits; the
 * caller's. */
static void keep_busy(struct serve *s, struct gen *ret[2])
{
    static const int32_t token = 300;
    struct gen_request q = { .prompt = &token, .nprompt = 1, .max_tokens = 9, .ignore_eos = true,
                             .wake = hold };
    sample_defaults(&q.sample);
    sem_init(&gate, 0, 0);
    for (int i = 0; i < 2; i++) {
        struct err err = { 0 };
        if (sched_submit(s->sched, &q, &ret[i], &err) != ERR_OK)
            fail_msg("%s", err.msg);
        if (i == 0)
            gen_wait(ret[0], 0);
    }
}

static void a_full_queue_is_429_with_retry_after_and_nothing_stays_behind(void **state)
{
    (void)state;
    const struct serve_opts o = { .max_queue = 2, .max_seqs = 1 };
    struct serve *s = serve_open(&o);
    struct serve_resp r;
    struct gen *busy[2];
    keep_busy(s, busy);
    call(s, "POST", C, "{\"prompt\":\"a\",\"n\":2,\"max_tokens\":400,\"ignore_eos\":true}", &r);
    assert_int_equal(r.status, 429);
    assert_non_null(serve_header(&r, "Retry-After"));
    assert_string_equal(text_at(&r, "error.code"), "queue_full");
    serve_resp_free(&r);
    sem_post(&gate);
    gen_release(busy[0]);
    gen_release(busy[1]);
    /* All were cancelled, which the engine notices within a step or two. */
    int status = 429;
    for (int i = 0; i < 2000 && status == 429; i++) {
        call(s, "POST", C, "{\"prompt\":\"a\",\"n\":2,\"max_tokens\":2}", &r);
        status = r.status;
        serve_resp_free(&r);
        usleep(1000);
    }
    assert_int_equal(status, 200);
    serve_close(s);
}

/* Trying again would not help. */
static void more_choices_than_the_queue_holds_are_400(void **state)
{
    (void)state;
    const struct serve_opts o = { .max_queue = 2, .max_seqs = 1 };
    struct serve *s = serve_open(&o);
    struct serve_resp r;
    call(s, "POST", C, "{\"prompt\":\"a\",\"n\":3}", &r);
    assert_int_equal(r.status, 400);
    assert_string_equal(text_at(&r, "error.param"), "n");
    assert_non_null(strstr(serve_message(&r), "takes at most 2 at once (--max-queue)"));
    serve_resp_free(&r);
    call(s, "POST", C, "{\"prompt\":[\"a\",\"b\",\"c\"]}", &r);
    assert_int_equal(r.status, 400);
    assert_string_equal(text_at(&r, "error.param"), "prompt");
    serve_resp_free(&r);
    serve_close(s);
}

static void a_generation_past_its_deadline_is_504(void **state)
{
    (void)state;
    const struct serve_opts o = { .request_seconds = 0.02 };
    struct serve *s = serve_open(&o);
    struct serve_resp r;
    call(s, "POST", C, "{\"prompt\":\"a\",\"n\":64,\"max_tokens\":500,\"ignore_eos\":true}", &r);
    assert_int_equal(r.status, 504);
    serve_resp_free(&r);
    call(s, "POST", C, "{\"prompt\":\"a\",\"n\":64,\"max_tokens\":500,\"ignore_eos\":true,\"stream\":true}", &r);
    if (r.status == 200) { /* it had begun: an event says so */
        assert_non_null(strstr(r.text, "deadline_exceeded"));
        assert_null(strstr(r.text, "[DONE]"));
    } else {
        assert_int_equal(r.status, 504);
    }
    serve_resp_free(&r);
    serve_close(s);
}

static void a_draining_server_is_not_ready_and_takes_no_work(void **state)
{
    (void)state;
    struct serve *s = serve_open(NULL);
    struct serve_resp r;
    call(s, "GET", "/ready", NULL, &r);
    assert_int_equal(r.status, 200);
    serve_resp_free(&r);
    api_set_draining(s->api);
    sched_drain(s->sched, 1);
    call(s, "GET", "/ready", NULL, &r);
    assert_int_equal(r.status, 503);
    serve_resp_free(&r);
    call(s, "POST", C, "{\"prompt\":\"a\"}", &r);
    assert_int_equal(r.status, 503);
    serve_resp_free(&r);
    call(s, "GET", "/health", NULL, &r);
    assert_int_equal(r.status, 200);
    serve_resp_free(&r);
    serve_close(s);
}

static void the_web_page_has_an_etag_and_a_policy(void **state)
{
    struct serve_resp r;
    call(*state, "GET", "/", NULL, &r);
    assert_int_equal(r.status, 200);
    assert_non_null(strstr(serve_header(&r, "Content-Security-Policy"), "default-src 'none'"));
    char match[60];
    snprintf(match, sizeof match, "If-None-Match: %s", serve_header(&r, "ETag"));
    serve_resp_free(&r);
    const struct serve_req again = { .method = "GET", .path = "/index.html", .headers = { match } };
    serve_call(*state, &again, &r);
    assert_int_equal(r.status, 304);
    serve_resp_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_have_a_status_and_a_sentence_that_names_the_fault),
        cmocka_unit_test(a_wrong_method_says_which_are_right),
        cmocka_unit_test(fields_that_change_nothing_are_let_pass),
        cmocka_unit_test(models_are_the_base_and_the_adapters),
        cmocka_unit_test(an_adapter_shows_its_ranks_and_what_pruning_left),
        cmocka_unit_test(two_adapters_are_compared_and_a_version_is_like_itself),
        cmocka_unit_test(the_list_is_paged_by_name),
        cmocka_unit_test(uploads_make_versions_and_the_same_bytes_make_none),
        cmocka_unit_test(forms_with_wrong_parts_are_refused_by_name),
        cmocka_unit_test(tar_files_with_odd_entries_are_refused_by_name),
        cmocka_unit_test(a_download_goes_back_in_as_the_same_version),
        cmocka_unit_test(a_completion_has_openais_shape_and_says_how_to_replay_it),
        cmocka_unit_test(a_stream_says_the_same_as_the_answer_in_one_piece),
        cmocka_unit_test(a_chat_stream_begins_with_the_role_and_ends_with_the_reason),
        cmocka_unit_test(logprobs_come_in_the_shape_of_each_route),
        cmocka_unit_test(prompts_may_be_texts_or_tokens_one_or_many),
        cmocka_unit_test(a_stop_string_ends_the_text_before_it),
        cmocka_unit_test(adapters_with_weights_are_combined),
        cmocka_unit_test(a_prompt_that_is_too_long_names_both_numbers),
        cmocka_unit_test(an_adapter_of_another_base_is_refused_when_used),
        cmocka_unit_test(tokens_go_there_and_back),
        cmocka_unit_test(web_pages_elsewhere_cannot_use_a_server_without_keys),
        cmocka_unit_test(with_keys_each_tenant_sees_its_own_and_nothing_else),
        cmocka_unit_test(a_server_that_others_can_reach_needs_a_key_even_when_there_is_none),
        cmocka_unit_test(a_full_queue_is_429_with_retry_after_and_nothing_stays_behind),
        cmocka_unit_test(more_choices_than_the_queue_holds_are_400),
        cmocka_unit_test(a_generation_past_its_deadline_is_504),
        cmocka_unit_test(a_draining_server_is_not_ready_and_takes_no_work),
        cmocka_unit_test(the_web_page_has_an_etag_and_a_policy),
    };
    return cmocka_run_group_tests_name("api", tests, setup, teardown);
}
