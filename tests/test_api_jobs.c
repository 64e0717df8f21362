/* test_api_jobs.c - files and fine-tuning jobs through the API, on the demo base; what a runner does is
 * done here by calling the store. */
#include "api/train_params.h"
#include "store/jobs.h"
#include "tests/support_serve.h"
#include "tests/support_store.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define F "/v1/files"
#define J "/v1/fine_tuning/jobs"

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

static int setup(void **state)
{
    err_clear(&err);
    *state = serve_open(&(struct serve_opts){ .max_jobs = 50 });
    return 0;
}

static int teardown(void **state)
{
    serve_close(*state);
    return 0;
}

/* --- requests ------------------------------------------------------------------------------------- */
static char key_header[80]; /* "Authorization: ..." of who asks, or "" */

static void call(struct serve *s, const char *method, const char *path, const char *body,
                 const char *header, struct serve_resp *ret)
{
    struct serve_req r = { .method = method, .path = path, .body = body };
    int n = 0;
    if (key_header[0] != '\0')
        r.headers[n++] = key_header;
    r.headers[n] = header;
    serve_call(s, &r, ret);
}

static json_t *at(const struct serve_resp *r, const char *path)
{
    json_t *j = r->json;
    while (j != NULL && *path != '\0') {
        char key[64];
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

static void expect(const struct serve_resp *r, int status, const char *says)
{
    if (r->status != status || strstr(r->status >= 400 ? serve_message(r) : r->text, says) == NULL)
        fail_msg("status %d, not %d with \"%s\": %.600s", r->status, status, says, r->text);
}

/* What a form has beside the file. */
struct upload {
    const char *filename, *purpose, *anchor, *seconds, *extra;
};

static void upload(struct serve *s, const char *data, const struct upload *u,
                   struct serve_resp *ret)
{
    struct spool *spool;
    ok(spool_open(s->db_path, 8 << 20, &spool, &err));
    ok(spool_write(spool, data, strlen(data), &err));
    struct api_part parts[5] = { { .name = "file", .filename = (char *)(uintptr_t)u->filename,
                                   .spool = spool } };
    size_t n = 1;
    const char *const names[] = { "purpose", "expires_after[anchor]", "expires_after[seconds]",
                                  "colour" };
    const char *const values[] = { u->purpose, u->anchor, u->seconds, u->extra };
    for (int i = 0; i < 4; i++)
        if (values[i] != NULL)
            parts[n++] = (struct api_part){ .name = (char *)(uintptr_t)names[i],
                                            .value = (char *)(uintptr_t)values[i],
                                            .len = strlen(values[i]) };
    struct serve_req r = { .method = "POST", .path = F,
                           .headers = { "Content-Type: multipart/form-data; boundary=x" },
                           .parts = parts, .nparts = n };
    if (key_header[0] != '\0')
        r.headers[1] = key_header;
    serve_call(s, &r, ret);
    spool_close(spool);
}

#define LINE "{\"prompt\": \"a\", \"completion\": \"b\"}\n"

static void add_file(struct serve *s, const char *purpose, char ret[STORE_ID_MAX + 1])
{
    struct serve_resp r;
    upload(s, LINE LINE, &(struct upload){ "train.jsonl", purpose, NULL, NULL, NULL }, &r);
    assert_int_equal(r.status, 200);
    snprintf(ret, STORE_ID_MAX + 1, "%s", text_at(&r, "id"));
    serve_resp_free(&r);
}

/* A body with %F for a training file and %E for one for evaluation. */
static char *fill_in(const char *text, const char *file, const char *evals)
{
    struct buf b;
    buf_init(&b, 1 << 16);
    for (const char *p = text; *p != '\0'; p++) {
        if (p[0] == '%' && (p[1] == 'F' || p[1] == 'E'))
            buf_puts(&b, *++p == 'F' ? file : evals);
        else
            buf_add(&b, p, 1);
    }
    return buf_take(&b);
}

static void create(struct serve *s, const char *text, const char *file, struct serve_resp *ret)
{
    char *body = fill_in(text, file, file);
    call(s, "POST", J, body, NULL, ret);
    free(body);
}

/* A job, and its id. */
static void make_job(struct serve *s, const char *text, char ret[STORE_ID_MAX + 1])
{
    char file[STORE_ID_MAX + 1];
    struct serve_resp r;
    add_file(s, "fine-tune", file);
    create(s, text, file, &r);
    expect(&r, 200, "ftjob-");
    snprintf(ret, STORE_ID_MAX + 1, "%s", text_at(&r, "id"));
    serve_resp_free(&r);
}

static char *path_of(const char *job, const char *tail)
{
    static char path[128];
    snprintf(path, sizeof path, J "/%s%s", job, tail);
    return path;
}

static struct store_job start(struct serve *s)
{
    struct store_job j;
    ok(store_job_claim(s->st, s->base->hash_hex, "test", &j, &err));
    ok(store_job_started(s->st, j.id, j.claim, 10, &err));
    return j;
}

/* One step: metrics, a rank, an event. */
static void step(struct serve *s, const struct store_job *run, int64_t n, double loss)
{
    char message[64], data[64];
    snprintf(message, sizeof message, "Step %d/10: training loss=%.2f", (int)n, loss);
    snprintf(data, sizeof data, "{\"step\":%d,\"train_loss\":%.2f}", (int)n, loss);
    const struct store_metric m = { .step = n, .epoch = 0.5, .loss = loss, .valid_loss = NAN,
                                    .accuracy = 0.5, .valid_accuracy = NAN, .lr = 1e-4,
                                    .grad_norm = 1, .tokens_per_s = 100, .orth = NAN,
                                    .threshold = NAN, .tokens = 8, .targets = 4, .budget = -1,
                                    .kept = -1 };
    const struct store_rank k = { n, 0, MOD_Q, n < 3 ? 8 : 6 };
    const struct store_event_new e = { JOB_INFO, true, n, message, data };
    const struct store_report r = { .step = n, .trained_tokens = 8 * n, .seconds_per_step = 2,
                                    .metrics = &m, .nmetrics = 1, .ranks = &k, .nranks = 1,
                                    .events = &e, .nevents = 1 };
    ok(store_job_report(s->st, run->id, run->claim, &r, &err));
}

/* --- files ---------------------------------------------------------------------------------------- */
static void a_file_goes_in_and_comes_back(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1], path[96];
    upload(s, LINE LINE, &(struct upload){ "C:\\data\\tr\"ain.jsonl", "fine-tune", "created_at", "3600", NULL },
           &r);
    expect(&r, 200, "file-");
    assert_string_equal(text_at(&r, "object"), "file");
    assert_string_equal(text_at(&r, "filename"), "tr\"ain.jsonl");
    assert_string_equal(text_at(&r, "purpose"), "fine-tune");
    assert_string_equal(text_at(&r, "status"), "processed");
    assert_int_equal(int_at(&r, "bytes"), 2 * strlen(LINE));
    assert_in_range(int_at(&r, "expires_at") - int_at(&r, "created_at"), 3599, 3601);
    snprintf(id, sizeof id, "%s", text_at(&r, "id"));
    serve_resp_free(&r);
    snprintf(path, sizeof path, F "/%s", id);
    call(s, "GET", path, NULL, NULL, &r);
    expect(&r, 200, id);
    serve_resp_free(&r);
    snprintf(path, sizeof path, F "/%s/content", id);
    call(s, "GET", path, NULL, NULL, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(r.text, LINE LINE);
    assert_string_equal(serve_header(&r, "Content-Disposition"), "attachment; filename=\"tr_ain.jsonl\"");
    serve_resp_free(&r);
    call(s, "DELETE", strcpy(path + strlen(F) + 1, id) - strlen(F) - 1, NULL, NULL, &r);
    expect(&r, 200, "\"deleted\":true");
    serve_resp_free(&r);
    call(s, "GET", path, NULL, NULL, &r);
    expect(&r, 404, id);
    serve_resp_free(&r);
    assert_int_equal(serve_spooled(s), 0);
}

static void files_that_are_no_good_are_refused_by_name(void **state)
{
    static const struct { const char *data; struct upload u; int status; const char *says; } cases[] = {
        { LINE, { "f", NULL, NULL, NULL, NULL }, 400, "no part `purpose`" },
        { LINE, { "f", "assistants", NULL, NULL, NULL }, 400, "\"assistants\" are not kept" },
        { LINE, { "f", "batch", NULL, NULL, NULL }, 400, "batch" },
        { LINE, { "f", "vision", NULL, NULL, NULL }, 400, "vision" },
        { LINE, { "f", "user_data", NULL, NULL, NULL }, 400, "user_data" },
        { LINE, { "f", "fun", NULL, NULL, NULL }, 400, "`purpose` must be fine-tune or evals" },
        { LINE, { "f", "evals", NULL, NULL, "red" }, 400, "`colour`" },
        { LINE, { "f", "evals", "now", "3600", NULL }, 400, "created_at" },
        { LINE, { "f", "evals", "created_at", NULL, NULL }, 400, "both" },
        { LINE, { "f", "evals", NULL, "3600", NULL }, 400, "both" },
        { LINE, { "f", "evals", "created_at", "3599", NULL }, 400, "from 3600 to 2592000" },
        { LINE, { "f", "evals", "created_at", "1h", NULL }, 400, "\"1h\"" },
        { LINE, { "a\nb", "evals", NULL, NULL, NULL }, 400, "control characters" },
        { LINE, { "\xff", "evals", NULL, NULL, NULL }, 400, "UTF-8" },
        { "", { "f", "evals", NULL, NULL, NULL }, 400, "empty" },
        { "\n\n", { "f", "evals", NULL, NULL, NULL }, 400, "nothing" },
        { LINE "{\n" LINE, { "f", "fine-tune", NULL, NULL, NULL }, 400, "line 2" },
        { LINE "{\n" LINE "7\n", { "f", "fine-tune", NULL, NULL, NULL }, 400,
          "2 of 4 lines are unusable: line 2: " },
        { LINE "{\n" LINE "7\n", { "f", "fine-tune", NULL, NULL, NULL }, 400, "line 4: " },
        { "{\"a\":1}\n", { "f", "fine-tune", NULL, NULL, NULL }, 400, "line 1" },
    };
    struct serve *s = *state;
    struct serve_resp r;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        upload(s, cases[i].data, &cases[i].u, &r);
        if (r.status != cases[i].status || strstr(serve_message(&r), cases[i].says) == NULL)
            fail_msg("case %zu: %d %s", i, r.status, r.text);
        serve_resp_free(&r);
    }
    char *big = malloc((1 << 20) + 100);
    memset(big, ' ', (1 << 20) + 99);
    big[(1 << 20) + 99] = '\0';
    upload(s, big, &cases[6].u, &r); /* an unknown part comes first */
    expect(&r, 400, "colour");
    serve_resp_free(&r);
    upload(s, big, &(struct upload){ "f", "evals", NULL, NULL, NULL }, &r);
    expect(&r, 413, "--max-file");
    serve_resp_free(&r);
    free(big);
    call(s, "GET", F, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
    call(s, "POST", F, "{}", NULL, &r);
    expect(&r, 415, "file and purpose");
    serve_resp_free(&r);
    assert_int_equal(serve_spooled(s), 0);
}

static void files_are_paged_in_both_orders(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[3][STORE_ID_MAX + 1], path[128];
    for (int i = 0; i < 3; i++)
        add_file(s, i == 1 ? "evals" : "fine-tune", id[i]);
    call(s, "GET", F "?limit=2", NULL, NULL, &r);
    assert_string_equal(text_at(&r, "data.0.id"), id[2]);
    assert_string_equal(text_at(&r, "first_id"), id[2]);
    assert_string_equal(text_at(&r, "last_id"), id[1]);
    assert_true(json_is_true(at(&r, "has_more")));
    serve_resp_free(&r);
    snprintf(path, sizeof path, F "?order=asc&purpose=fine-tune&after=%s", id[0]);
    call(s, "GET", path, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 1);
    assert_string_equal(text_at(&r, "data.0.id"), id[2]);
    assert_true(json_is_false(at(&r, "has_more")));
    serve_resp_free(&r);
}

/* --- creation ------------------------------------------------------------------------------------- */
static void what_is_wrong_with_a_request_is_named(void **state)
{
#define OK "\"model\":\"demo-base\",\"training_file\":\"%F\""
#define LORA(fields) "{" OK ",\"method\":{\"type\":\"lora\",\"lora\":{" fields "}}}"
#define ADALORA(fields) "{" OK ",\"method\":{\"type\":\"adalora\",\"adalora\":{" fields "}}}"
    static const struct { const char *body; int status; const char *says, *param; } cases[] = {
        { "{}", 400, "`model` is missing", "model" },
        { "{\"model\":\"demo-base\"}", 400, "`training_file` is missing", "training_file" },
        { "{\"model\":7,\"training_file\":\"%F\"}", 400, "`model`", "model" },
        { "{\"model\":\"nobody\",\"training_file\":\"%F\"}", 404, "nobody", "model" },
        { "{\"model\":\"ft:demo-base:default:x:y\",\"training_file\":\"%F\"}", 404, "ft:", "model" },
        { "{\"model\":\"demo-base\",\"training_file\":\"file-no\"}", 400, "file-no", "training_file" },
        { "{\"model\":\"demo-base\",\"training_file\":\"%E\"}", 400, "is evals, not fine-tune",
          "training_file" },
        { "{" OK ",\"validation_file\":\"file-no\"}", 400, "file-no", "validation_file" },
        { "{" OK ",\"validation_file\":1}", 400, "`validation_file`", "validation_file" },
        { "{" OK ",\"nonsense\":1}", 400, "`nonsense`", NULL },
        { "{" OK ",\"suffix\":\"Not A Name\"}", 400, "`suffix`", "suffix" },
        { "{" OK ",\"suffix\":\"demo-base\"}", 409, "name of the base", "suffix" },
        { "{" OK ",\"suffix\":7}", 400, "`suffix`", "suffix" },
        { "{" OK ",\"seed\":-1}", 400, "`seed`", "seed" },
        { "{" OK ",\"seed\":2147483648}", 400, "`seed`", "seed" },
        { "{" OK ",\"seed\":1.5}", 400, "`seed`", "seed" },
        { "{" OK ",\"integrations\":[{\"type\":\"wandb\"}]}", 400, "wandb", "integrations" },
        { "{" OK ",\"integrations\":7}", 400, "integrations", "integrations" },
        { "{" OK ",\"metadata\":[]}", 400, "metadata", "metadata" },
        { "{" OK ",\"metadata\":{\"k\":1}}", 400, "\"k\"", "metadata" },
        { "{" OK ",\"activate\":1}", 400, "`activate`", "activate" },
        { "{" OK ",\"activate_if\":7}", 400, "activate_if", "activate_if" },
        { "{" OK ",\"activate_if\":{}}", 400, "max_loss", "activate_if" },
        { "{" OK ",\"activate_if\":{\"max_loss\":0}}", 400, "max_loss", "activate_if" },
        { "{" OK ",\"activate_if\":{\"max_loss\":2}}", 400, "measure the loss on", "activate_if" },
        { "{" OK ",\"activate_if\":{\"max_loss\":2,\"x\":1}}", 400, "`x`", "activate_if" },
        { "{" OK ",\"activate_if\":{\"max_loss\":2,\"file\":\"file-no\"}}", 400, "file-no", "activate_if" },
        { "{" OK ",\"activate\":false,\"activate_if\":{\"max_loss\":2,\"file\":\"%E\"}}", 400, "is false",
          "activate_if" },
        { "{" OK ",\"hyperparameters\":7}", 400, "hyperparameters", "hyperparameters" },
        { "{" OK ",\"hyperparameters\":{\"x\":1}}", 400, "`x`", "hyperparameters" },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":0}}", 400, "`n_epochs`", "n_epochs" },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":51}}", 400, "from 1 to 50", "n_epochs" },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":1.5}}", 400, "an integer", "n_epochs" },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":\"many\"}}", 400, "`n_epochs`", "n_epochs" },
        { "{" OK ",\"hyperparameters\":{\"batch_size\":257}}", 400, "from 1 to 256", "batch_size" },
        { "{" OK ",\"hyperparameters\":{\"learning_rate_multiplier\":0}}", 400,
          "`learning_rate_multiplier`", "learning_rate_multiplier" },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":2},\"method\":{\"type\":\"lora\"}}", 400,
          "settings of its own", NULL },
        { "{" OK ",\"hyperparameters\":{\"n_epochs\":2},\"method\":{\"type\":\"lora\",\"lora\":{}}}", 400,
          "settings of its own", "hyperparameters" },
        { "{" OK ",\"method\":7}", 400, "`method`", "method" },
        { "{" OK ",\"method\":{}}", 400, "`type`", "method" },
        { "{" OK ",\"method\":{\"type\":\"type\"}}", 400, "type", "method" },
        { "{" OK ",\"method\":{\"type\":7}}", 400, "`type`", "type" },
        { "{" OK ",\"method\":{\"type\":\"dpo\",\"dpo\":{}}}", 400, "\"dpo\"", "method" },
        { "{" OK ",\"method\":{\"type\":\"reinforcement\"}}", 400, "reinforcement", "method" },
        { "{" OK ",\"method\":{\"type\":\"lora\",\"dora\":{}}}", 400, "`dora`", "method" },
        { "{" OK ",\"method\":{\"type\":\"lora\",\"lora\":7}}", 400, "`lora`", "method" },
        { "{" OK ",\"method\":{\"type\":\"supervised\",\"supervised\":{\"x\":1}}}", 400, "`x`", "method" },
        { "{" OK ",\"method\":{\"type\":\"supervised\",\"supervised\":{\"hyperparameters\":"
          "{\"x\":1}}}}", 400, "`x`", "hyperparameters" },
        { LORA("\"r\":8"), 400, "unknown field `r`", "method" },
        { LORA("\"rank\":0"), 400, "`rank`", "rank" },
        { LORA("\"rank\":\"8\""), 400, "`rank`", "rank" },
        { LORA("\"rank\":4097"), 400, "4096", "rank" },
        { LORA("\"target_r\":8"), 400, "is of adalora", "method" },
        { LORA("\"tinit\":8"), 400, "is of adalora", "method" },
        { LORA("\"alpha\":-1"), 400, "alpha", "alpha" },
        { LORA("\"alpha\":\"16\""), 400, "alpha", "alpha" },
        { LORA("\"dropout\":1"), 400, "dropout", "dropout" },
        { LORA("\"init\":\"pissa\""), 400, "default, gaussian, normal", "init" },
        { LORA("\"target_modules\":[]"), 400, "target_modules", "target_modules" },
        { LORA("\"target_modules\":[7]"), 400, "element 0", "target_modules" },
        { LORA("\"target_modules\":\"q_proj\""), 400, "all-linear", "target_modules" },
        { LORA("\"rank_pattern\":[]"), 400, "rank_pattern", "rank_pattern" },
        { LORA("\"rank_pattern\":{\"q_proj\":0}"), 400, "q_proj", "rank_pattern" },
        { LORA("\"alpha_pattern\":{\"q_proj\":0}"), 400, "q_proj", "alpha_pattern" },
        { LORA("\"learning_rate\":0"), 400, "learning_rate", "learning_rate" },
        { LORA("\"schedule\":\"step\""), 400, "constant, linear, cosine", "schedule" },
        { LORA("\"warmup\":-1"), 400, "warmup", "warmup" },
        { LORA("\"max_steps\":-1"), 400, "max_steps", "max_steps" },
        { LORA("\"epochs\":0"), 400, "epochs", "epochs" },
        { LORA("\"batch_size\":0"), 400, "batch_size", "batch_size" },
        { LORA("\"accumulate\":0"), 400, "accumulate", "accumulate" },
        { LORA("\"max_length\":-1"), 400, "max_length", "max_length" },
        { LORA("\"weight_decay\":-1"), 400, "weight_decay", "weight_decay" },
        { LORA("\"clip\":-1"), 400, "clip", "clip" },
        { LORA("\"lr_b_ratio\":0"), 400, "lr_b_ratio", "lr_b_ratio" },
        { LORA("\"adam_beta1\":1"), 400, "adam_beta1", "adam_beta1" },
        { LORA("\"adam_beta2\":-1"), 400, "adam_beta2", "adam_beta2" },
        { LORA("\"adam_eps\":0"), 400, "adam_eps", "adam_eps" },
        { LORA("\"adam_eps\":1e-300"), 400, "adam_eps", "adam_eps" },
        { LORA("\"moments\":\"4bit\""), 400, "f32, 8bit", "moments" },
        { LORA("\"dtype\":\"f16\""), 400, "f32, bf16", "dtype" },
        { LORA("\"shuffle\":1"), 400, "shuffle", "shuffle" },
        { LORA("\"patience\":2"), 400, "eval_every", "patience" },
        { LORA("\"eval_every\":5"), 400, "`validation_file`", "validation_file" },
        { LORA("\"seed\":-1"), 400, "`seed`", "seed" },
        { "{" OK ",\"seed\":1,\"method\":{\"type\":\"lora\",\"lora\":{\"seed\":2}}}", 400, "`seed`",
          "seed" },
        { ADALORA("\"rank\":8,\"target_r\":4"), 400, "another name", "target_r" },
        { ADALORA("\"target_r\":8,\"init_r\":4"), 400, "init_r", "init_r" },
        { ADALORA("\"deltaT\":0"), 400, "deltaT", "deltaT" },
        { ADALORA("\"beta1\":1"), 400, "adalora.beta1", "adalora.beta1" },
        { ADALORA("\"orth_reg_weight\":-1"), 400, "orth_reg_weight", "orth_reg_weight" },
        { ADALORA("\"rank_pattern\":{\"q_proj\":2}"), 400, "rank_pattern", "rank_pattern" },
        { ADALORA("\"init\":\"gaussian\""), 400, "init", "init" },
    };
    struct serve *s = *state;
    char file[STORE_ID_MAX + 1], evals[STORE_ID_MAX + 1];
    add_file(s, "fine-tune", file);
    add_file(s, "evals", evals);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct serve_resp r;
        char *body = fill_in(cases[i].body, file, evals);
        call(s, "POST", J, body, NULL, &r);
        const char *param = json_string_value(at(&r, "error.param"));
        if (r.status != cases[i].status || strstr(serve_message(&r), cases[i].says) == NULL ||
            (cases[i].param != NULL && (param == NULL || strcmp(param, cases[i].param) != 0)))
            fail_msg("case %zu, %s: %d %s", i, body, r.status, r.text);
        serve_resp_free(&r);
        free(body);
    }
    struct serve_resp r;
    call(s, "GET", J, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
    assert_int_equal(s->jobs_woken, 0);
}

static void openais_request_gives_openais_job(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char file[STORE_ID_MAX + 1];
    add_file(s, "fine-tune", file);
    create(s, "{" OK ",\"validation_file\":null,\"suffix\":\"my-tenant\",\"seed\":7,\"hyperparameters\":"
           "{\"batch_size\":\"auto\",\"learning_rate_multiplier\":\"auto\",\"n_epochs\":\"auto\"},"
           "\"method\":{\"type\":\"supervised\",\"supervised\":{\"hyperparameters\":{\"batch_size\":4,"
           "\"learning_rate_multiplier\":0.5,\"n_epochs\":2}}},\"integrations\":[],"
           "\"metadata\":{\"k\":\"v\"}}", file, &r);
    expect(&r, 200, "ftjob-");
    assert_string_equal(text_at(&r, "object"), "fine_tuning.job");
    assert_string_equal(text_at(&r, "status"), "queued");
    assert_string_equal(text_at(&r, "model"), "demo-base");
    assert_string_equal(text_at(&r, "organization_id"), "default");
    assert_string_equal(text_at(&r, "training_file"), file);
    assert_true(json_is_null(at(&r, "validation_file")));
    assert_true(json_is_null(at(&r, "fine_tuned_model")));
    assert_true(json_is_null(at(&r, "finished_at")));
    assert_true(json_is_null(at(&r, "error")));
    assert_true(json_is_null(at(&r, "trained_tokens")));
    assert_true(json_is_array(at(&r, "result_files")));
    assert_true(json_is_array(at(&r, "integrations")));
    assert_int_equal(int_at(&r, "seed"), 7);
    assert_int_equal(int_at(&r, "hyperparameters.n_epochs"), 2);
    assert_int_equal(int_at(&r, "hyperparameters.batch_size"), 4);
    assert_float_equal(json_number_value(at(&r, "hyperparameters.learning_rate_multiplier")), 0.5, 1e-12);
    assert_string_equal(text_at(&r, "method.type"), "supervised");
    assert_int_equal(int_at(&r, "method.supervised.hyperparameters.n_epochs"), 2);
    assert_string_equal(text_at(&r, "metadata.k"), "v");
    assert_string_equal(text_at(&r, "user_provided_suffix"), "my-tenant");
    assert_string_equal(text_at(&r, "lorad.params.type"), "lora");
    assert_float_equal(json_number_value(at(&r, "lorad.params.lora.learning_rate")), 1e-4, 1e-12);
    assert_int_equal(int_at(&r, "lorad.params.lora.seed"), 7);
    assert_int_equal(s->jobs_woken, 1);
    serve_resp_free(&r);
    /* the old way, and the shortest */
    create(s, "{" OK ",\"hyperparameters\":{\"n_epochs\":5}}", file, &r);
    assert_int_equal(int_at(&r, "hyperparameters.n_epochs"), 5);
    assert_true(json_is_null(at(&r, "user_provided_suffix")));
    assert_int_equal(int_at(&r, "seed"), 42);
    serve_resp_free(&r);
    create(s, "{" OK "}", file, &r);
    assert_int_equal(int_at(&r, "hyperparameters.batch_size"), 8);
    assert_string_equal(text_at(&r, "method.type"), "supervised");
    serve_resp_free(&r);
}

/* Two options are the same if their JSON is. */
static char *params_text(const char *method)
{
    struct train_opts o;
    json_t *j = method != NULL ? json_loads(method, 0, NULL) : NULL;
    assert_true(method == NULL || j != NULL);
    ok(api_train_params(j, &o, &err));
    json_decref(j);
    j = api_train_params_json(&o);
    train_opts_free(&o);
    char *text = json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(17));
    json_decref(j);
    return text;
}

static void options_written_and_read_again_are_the_same(void **state)
{
    (void)state;
    static const char *const methods[] = {
        NULL, "{\"type\":\"dora\"}", "{\"type\":\"rslora\",\"rslora\":null}",
        "{\"type\":\"lora\",\"lora\":{\"rank\":4,\"alpha\":8,\"target_modules\":[\"q_proj\",\"v_proj\"],"
        "\"dropout\":0.1,\"init\":\"normal\",\"rank_pattern\":{\"b\":2,\"a\":3},\"alpha_pattern\":"
        "{\"a\":1.5,\"b\":2},\"learning_rate\":0.001,\"schedule\":\"cosine\",\"warmup\":10,"
        "\"max_steps\":100,\"epochs\":1,\"batch_size\":2,\"accumulate\":3,\"micro_tokens\":64,"
        "\"max_length\":128,\"weight_decay\":0.01,\"clip\":0,\"lr_b_ratio\":16,\"moments\":\"8bit\","
        "\"eval_every\":10,\"patience\":3,\"checkpoint_every\":5,\"dtype\":\"bf16\",\"seed\":9,"
        "\"shuffle\":false,\"adam_beta1\":0.8,\"adam_beta2\":0.99,\"adam_eps\":1e-6}}",
        "{\"type\":\"adalora\",\"adalora\":{\"target_r\":4,\"init_r\":6,\"tinit\":10,\"tfinal\":20,"
        "\"deltaT\":2,\"beta1\":0.8,\"beta2\":0.9,\"orth_reg_weight\":0.1}}",
    };
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
        char *once = params_text(methods[i]), *twice = params_text(once);
        assert_string_equal(once, twice);
        free(once);
        free(twice);
    }
    struct train_opts o;
    json_t *j = json_loads(methods[3], 0, NULL);
    ok(api_train_params(j, &o, &err));
    json_decref(j);
    assert_true(o.method == METHOD_LORA && o.rank == 4 && o.alpha == 8 && o.ntargets == 2 &&
                strcmp(o.targets[1], "v_proj") == 0 && o.dropout == 0.1 &&
                o.init == TRAIN_INIT_NORMAL && o.npatterns == 4 && o.patterns[0].rank == 2 &&
                strcmp(o.patterns[2].pattern, "a") == 0 && o.patterns[2].alpha == 1.5);
    assert_true(o.lr == 0.001 && o.schedule == TRAIN_COSINE && o.warmup == 10 &&
                o.max_steps == 100 && o.epochs == 1 && o.batch == 2 && o.accumulate == 3 &&
                o.micro_tokens == 64 && o.max_length == 128 && o.weight_decay == 0.01 &&
                o.clip == 0 && o.lr_b_ratio == 16 && o.moments == TRAIN_MOMENTS_8BIT);
    assert_true(o.eval_every == 10 && o.patience == 3 && o.checkpoint_every == 5 &&
                o.dtype == DT_BF16 && o.seed == 9 && !o.shuffle && o.beta1 == 0.8 &&
                o.beta2 == 0.99 && o.eps == 1e-6);
    train_opts_free(&o);
    j = json_loads(methods[4], 0, NULL);
    ok(api_train_params(j, &o, &err));
    json_decref(j);
    assert_true(o.method == METHOD_ADALORA && o.rank == 4 && o.adalora.init_r == 6 &&
                o.adalora.tinit == 10 && o.adalora.tfinal == 20 && o.adalora.deltaT == 2 &&
                o.adalora.beta1 == 0.8 && o.adalora.beta2 == 0.9 &&
                o.adalora.orth_reg_weight == 0.1);
    train_opts_free(&o);
    /* nothing said: the trainer's own defaults */
    struct train_opts d;
    train_opts_init(&d);
    json_t *defaults = api_train_params_json(&d);
    char *text = json_dumps(defaults, JSON_COMPACT | JSON_REAL_PRECISION(17)),
         *read = params_text(NULL);
    assert_string_equal(text, read);
    free(text);
    free(read);
    json_decref(defaults);
    train_opts_free(&d);
}

static void training_goes_on_from_a_version(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char file[STORE_ID_MAX + 1];
    serve_add_adapter(s, 1, "shakespeare", DEMO_ADAPTER("shakespeare"));
    serve_add_adapter(s, 1, "whitman", DEMO_ADAPTER("whitman"));
    add_file(s, "fine-tune", file);
    create(s, "{\"model\":\"shakespeare\",\"training_file\":\"%F\"}", file, &r);
    expect(&r, 200, "ftjob-");
    assert_string_equal(text_at(&r, "lorad.from"), "shakespeare@1");
    assert_int_equal(int_at(&r, "lorad.params.lora.rank"), 16);
    serve_resp_free(&r);
    create(s, "{\"model\":\"whitman@1\",\"training_file\":\"%F\",\"method\":{\"type\":\"adalora\","
           "\"adalora\":{\"learning_rate\":0.001}}}", file, &r);
    expect(&r, 200, "whitman@1");
    assert_string_equal(text_at(&r, "lorad.params.type"), "adalora");
    serve_resp_free(&r);
    static const struct { const char *method, *says; } cases[] = {
        { "{\"type\":\"adalora\"}", "cannot go on as adalora" },
        { "{\"type\":\"lora\",\"lora\":{\"rank\":4}}", "`rank` is decided by shakespeare" },
        { "{\"type\":\"lora\",\"lora\":{\"alpha\":4}}", "`alpha` is decided" },
        { "{\"type\":\"lora\",\"lora\":{\"init\":\"gaussian\"}}", "`init` is decided" },
        { "{\"type\":\"lora\",\"lora\":{\"target_modules\":[\"q_proj\"]}}", "`target_modules`" },
        { "{\"type\":\"lora\",\"lora\":{\"rank_pattern\":{}}}", "`rank_pattern`" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char body[300];
        snprintf(body, sizeof body, "{\"model\":\"shakespeare\",\"training_file\":\"%%F\",\"method\":%s}",
                 cases[i].method);
        create(s, body, file, &r);
        expect(&r, 400, cases[i].says);
        serve_resp_free(&r);
    }
    /* made for another base */
    struct adapter_src *a = support_adapter(1, 1, 2, 8);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = support_base_1,
                                      .origin = "upload" };
    struct store_version v;
    bool is_new;
    ok(store_adapter_put(s->st, 1, "foreign", a, &o, &v, &is_new, &err));
    store_version_free(&v);
    adapter_src_free(a);
    create(s, "{\"model\":\"foreign\",\"training_file\":\"%F\"}", file, &r);
    expect(&r, 409, "base with hash");
    serve_resp_free(&r);
}

static void the_same_key_makes_one_job(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char file[STORE_ID_MAX + 1], id[STORE_ID_MAX + 1];
    add_file(s, "fine-tune", file);
    char *a = fill_in("{" OK ",\"seed\":1}", file, file), *other = fill_in("{" OK "}", file, file);
    char *same = fill_in("{ \"seed\": 1, " OK "}", file, file);
    call(s, "POST", J, a, "Idempotency-Key: k1", &r);
    expect(&r, 200, "ftjob-");
    snprintf(id, sizeof id, "%s", text_at(&r, "id"));
    serve_resp_free(&r);
    call(s, "POST", J, same, "Idempotency-Key: k1", &r);
    expect(&r, 200, id);
    serve_resp_free(&r);
    call(s, "POST", J, other, "Idempotency-Key: k1", &r);
    expect(&r, 409, "k1");
    assert_string_equal(text_at(&r, "error.code"), "idempotency_conflict");
    serve_resp_free(&r);
    call(s, "POST", J, a, "Idempotency-Key: k2", &r);
    assert_string_not_equal(text_at(&r, "id"), id);
    serve_resp_free(&r);
    call(s, "POST", J, a, "Idempotency-Key: a b", &r);
    expect(&r, 400, "Idempotency-Key");
    serve_resp_free(&r);
    free(a);
    free(same);
    free(other);
}

static void the_same_key_gives_its_job_when_its_file_is_gone(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char file[STORE_ID_MAX + 1], id[STORE_ID_MAX + 1], path[80];
    add_file(s, "fine-tune", file);
    char *a = fill_in("{" OK "}", file, file);
    char *other = fill_in("{" OK ",\"seed\":1}", file, file);
    call(s, "POST", J, a, "Idempotency-Key: k1", &r);
    expect(&r, 200, "ftjob-");
    snprintf(id, sizeof id, "%s", text_at(&r, "id"));
    serve_resp_free(&r);
    snprintf(path, sizeof path, J "/%s/cancel", id);
    call(s, "POST", path, NULL, NULL, &r);
    expect(&r, 200, "cancelled");
    serve_resp_free(&r);
    snprintf(path, sizeof path, F "/%s", file);
    call(s, "DELETE", path, NULL, NULL, &r);
    expect(&r, 200, "true");
    serve_resp_free(&r);
    call(s, "POST", J, a, "Idempotency-Key: k1", &r);
    expect(&r, 200, id);
    serve_resp_free(&r);
    call(s, "POST", J, other, "Idempotency-Key: k1", &r);
    expect(&r, 409, "k1");
    serve_resp_free(&r);
    call(s, "POST", J, a, "Idempotency-Key: k2", &r);
    expect(&r, 400, "no file");
    serve_resp_free(&r);
    free(a);
    free(other);
}

static void jobs_are_bounded_per_tenant(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char file[STORE_ID_MAX + 1];
    add_file(s, "fine-tune", file);
    for (int i = 0; i < 50; i++) {
        create(s, "{" OK "}", file, &r);
        assert_int_equal(r.status, 200);
        serve_resp_free(&r);
    }
    create(s, "{" OK "}", file, &r);
    expect(&r, 429, "50 fine-tuning jobs");
    assert_non_null(serve_header(&r, "Retry-After"));
    serve_resp_free(&r);
}

/* --- lists and wishes ------------------------------------------------------------------------------ */
static void jobs_are_listed_newest_first(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[3][STORE_ID_MAX + 1], path[128];
    make_job(s, "{" OK ",\"metadata\":{\"team\":\"a\"}}", id[0]);
    make_job(s, "{" OK ",\"metadata\":{\"team\":\"b\",\"x\":\"1\"}}", id[1]);
    make_job(s, "{" OK "}", id[2]);
    call(s, "GET", J "?limit=2", NULL, NULL, &r);
    assert_string_equal(text_at(&r, "object"), "list");
    assert_string_equal(text_at(&r, "data.0.id"), id[2]);
    assert_string_equal(text_at(&r, "data.1.id"), id[1]);
    assert_true(json_is_true(at(&r, "has_more")));
    serve_resp_free(&r);
    snprintf(path, sizeof path, J "?after=%s", id[1]);
    call(s, "GET", path, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 1);
    assert_string_equal(text_at(&r, "data.0.id"), id[0]);
    serve_resp_free(&r);
    call(s, "GET", J "?metadata[team]=b&metadata[x]=1", NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 1);
    assert_string_equal(text_at(&r, "data.0.id"), id[1]);
    serve_resp_free(&r);
    call(s, "GET", J "?metadata[team]=c", NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
}

static void what_cannot_be_asked_is_refused(void **state)
{
    struct serve *s = *state;
    char id[STORE_ID_MAX + 1];
    make_job(s, "{" OK "}", id);
    static const struct { const char *method, *path, *body, *header; int status; const char *says; }
    cases[] = { /* %s: the job */
        { "GET", F "?limit=0", NULL, NULL, 400, "limit" },
        { "GET", F "?order=up", NULL, NULL, 400, "order" },
        { "GET", F "?after=file-no", NULL, NULL, 404, "file-no" },
        { "GET", F "/file-no", NULL, NULL, 404, "file-no" },
        { "GET", F "/file-no/content", NULL, NULL, 404, "file-no" },
        { "DELETE", F "/file-no", NULL, NULL, 404, "file-no" },
        { "PUT", F "/file-no", NULL, NULL, 405, "GET" },
        { "POST", J, NULL, NULL, 400, "body" },
        { "GET", J "?limit=x", NULL, NULL, 400, "limit" },
        { "GET", J "?after=ftjob-no", NULL, NULL, 404, "ftjob-no" },
        { "GET", J "?metadata[x=1", NULL, NULL, 400, "metadata" },
        { "GET", J "?metadata[]=1", NULL, NULL, 400, "metadata" },
        { "GET", J "/ftjob-no", NULL, NULL, 404, "ftjob-no" },
        { "POST", J "/ftjob-no/cancel", NULL, NULL, 404, "ftjob-no" },
        { "POST", J "/ftjob-no/pause", NULL, NULL, 404, "ftjob-no" },
        { "POST", J "/ftjob-no/resume", NULL, NULL, 404, "ftjob-no" },
        { "GET", J "/ftjob-no/events", NULL, NULL, 404, "ftjob-no" },
        { "GET", J "/ftjob-no/events?stream=true", NULL, NULL, 404, "ftjob-no" },
        { "GET", J "/ftjob-no/checkpoints", NULL, NULL, 404, "ftjob-no" },
        { "GET", J "/ftjob-no/metrics", NULL, NULL, 404, "ftjob-no" },
        { "DELETE", J "/ftjob-no", NULL, NULL, 404, "ftjob-no" },
        { "DELETE", J "/%s", NULL, NULL, 409, "cancel it first" },
        { "POST", J "/%s/cancel", "{\"x\":1}", NULL, 400, "`x`" },
        { "GET", J "/%s/events?limit=0", NULL, NULL, 400, "limit" },
        { "GET", J "/%s/events?after=7", NULL, NULL, 400, "`after`" },
        { "GET", J "/%s/events?after=ftevent-x-1", NULL, NULL, 400, "`after`" },
        { "GET", J "/%s/events?stream=true", NULL, "Last-Event-ID: x", 400, "Last-Event-ID" },
        { "GET", J "/%s/checkpoints?after=ftevent-1", NULL, NULL, 400, "`after`" },
        { "GET", J "/%s/checkpoints?limit=1001", NULL, NULL, 400, "limit" },
        { "GET", J "/%s/metrics?since=x", NULL, NULL, 400, "since" },
        { "GET", J "/%s/metrics?limit=0", NULL, NULL, 400, "limit" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct serve_resp r;
        char path[160];
        snprintf(path, sizeof path, cases[i].path, id);
        call(s, cases[i].method, path, cases[i].body, cases[i].header, &r);
        if (r.status != cases[i].status || strstr(serve_message(&r), cases[i].says) == NULL)
            fail_msg("case %zu, %s %s: %d %s", i, cases[i].method, path, r.status, r.text);
        serve_resp_free(&r);
    }
}

static void a_job_is_paused_resumed_cancelled_deleted(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1];
    make_job(s, "{" OK "}", id);
    call(s, "POST", path_of(id, "/pause"), NULL, NULL, &r);
    expect(&r, 200, "\"paused\":true");
    assert_string_equal(text_at(&r, "status"), "queued");
    assert_string_equal(text_at(&r, "lorad.status"), "paused");
    serve_resp_free(&r);
    call(s, "POST", path_of(id, "/resume"), "{}", NULL, &r);
    expect(&r, 200, "\"paused\":false");
    serve_resp_free(&r);
    struct store_job run = start(s);
    step(s, &run, 1, 3);
    call(s, "POST", path_of(id, "/pause"), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "running");
    assert_string_equal(text_at(&r, "lorad.wanted"), "pause");
    serve_resp_free(&r);
    ok(store_job_paused(s->st, run.id, run.claim, NULL, NULL, &err));
    call(s, "GET", path_of(id, ""), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "running");
    assert_string_equal(text_at(&r, "lorad.status"), "paused");
    assert_int_equal(int_at(&r, "lorad.step"), 1);
    serve_resp_free(&r);
    call(s, "POST", path_of(id, "/cancel"), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "cancelled");
    assert_true(int_at(&r, "finished_at") > 0);
    serve_resp_free(&r);
    call(s, "POST", path_of(id, "/resume"), NULL, NULL, &r);
    expect(&r, 409, "has cancelled");
    serve_resp_free(&r);
    assert_int_equal(s->jobs_woken, 5); /* not for what was refused */
    call(s, "DELETE", path_of(id, ""), NULL, NULL, &r);
    expect(&r, 200, "\"deleted\":true");
    serve_resp_free(&r);
    call(s, "GET", path_of(id, ""), NULL, NULL, &r);
    assert_int_equal(r.status, 404);
    serve_resp_free(&r);
    store_job_free(&run);
}

/* --- a run ------------------------------------------------------------------------------------------ */
static struct adapter_src *demo_adapter(struct serve *s)
{
    struct adapter_src *a;
    ok(peft_load_dir(&s->base->arch, DEMO_ADAPTER("shakespeare"), &a, &err));
    return a;
}

static void a_run_is_seen_from_start_to_end_and_its_adapter_answers(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1], model[200], body[400], after[80], path[240];
    make_job(s, "{" OK ",\"suffix\":\"poet\"}", id);
    struct store_job run = start(s);
    for (int i = 1; i <= 3; i++)
        step(s, &run, i, 4 - i);
    call(s, "GET", path_of(id, ""), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "running");
    assert_int_equal(int_at(&r, "trained_tokens"), 24);
    assert_in_range(int_at(&r, "estimated_finish") - (json_int_t)(now_unix_ms() / 1000), 12, 15);
    serve_resp_free(&r);
    /* metrics */
    call(s, "GET", path_of(id, "/metrics?limit=2"), NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 2);
    assert_int_equal(int_at(&r, "data.1.step"), 2);
    assert_float_equal(json_number_value(at(&r, "data.1.loss")), 2, 1e-9);
    assert_true(json_is_null(at(&r, "data.1.valid_loss")));
    assert_int_equal(json_array_size(at(&r, "ranks")), 1);
    assert_true(json_is_true(at(&r, "has_more")));
    serve_resp_free(&r);
    call(s, "GET", path_of(id, "/metrics?since=2"), NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 1);
    assert_int_equal(int_at(&r, "ranks.0.rank"), 6);
    assert_string_equal(text_at(&r, "ranks.0.module"), "q");
    serve_resp_free(&r);
    /* events, newest first */
    call(s, "GET", path_of(id, "/events?limit=2"), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "data.0.message"), "Step 3/10: training loss=1.00");
    assert_string_equal(text_at(&r, "data.0.type"), "metrics");
    assert_string_equal(text_at(&r, "data.0.object"), "fine_tuning.job.event");
    assert_int_equal(int_at(&r, "data.0.data.step"), 3);
    snprintf(after, sizeof after, "%s", text_at(&r, "data.1.id"));
    serve_resp_free(&r);
    snprintf(path, sizeof path, J "/%s/events?after=%s", id, after);
    call(s, "GET", path, NULL, NULL, &r);
    assert_string_equal(text_at(&r, "data.0.message"), "Step 1/10: training loss=3.00");
    assert_int_equal(json_array_size(at(&r, "data")), 4);
    assert_true(json_is_false(at(&r, "has_more")));
    serve_resp_free(&r);
    /* a checkpoint answers by its name while the job runs */
    struct adapter_src *a = demo_adapter(s);
    const struct store_checkpoint_new c = { .step = 3, .state = "s", .state_len = 1, .adapter = a,
                                            .train_loss = 1, .train_accuracy = 0.5,
                                            .valid_loss = NAN, .valid_accuracy = NAN };
    ok(store_job_checkpoint(s->st, run.id, run.claim, NULL, &c, &err));
    call(s, "GET", path_of(id, "/checkpoints"), NULL, NULL, &r);
    assert_int_equal(int_at(&r, "data.0.step_number"), 3);
    assert_float_equal(json_number_value(at(&r, "data.0.metrics.train_loss")), 1, 1e-9);
    assert_null(at(&r, "data.0.metrics.valid_loss"));
    assert_string_equal(text_at(&r, "data.0.fine_tuning_job_id"), id);
    assert_string_equal(text_at(&r, "first_id"), text_at(&r, "last_id"));
    snprintf(model, sizeof model, "%s", text_at(&r, "data.0.fine_tuned_model_checkpoint"));
    snprintf(path, sizeof path, "ft:demo-base:default:poet:%s:ckpt-step-3", id + 6);
    assert_string_equal(model, path);
    snprintf(path, sizeof path, J "/%s/checkpoints?after=%s", id, text_at(&r, "last_id"));
    serve_resp_free(&r);
    call(s, "GET", path, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
    snprintf(body, sizeof body, "{\"model\":\"%s\",\"prompt\":\"The sea\",\"max_tokens\":4,"
             "\"temperature\":0}", model);
    call(s, "POST", "/v1/completions", body, NULL, &r);
    assert_int_equal(r.status, 200);
    assert_string_equal(text_at(&r, "model"), model);
    char *said = strdup(text_at(&r, "choices.0.text"));
    serve_resp_free(&r);
    call(s, "GET", "/v1/models", NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 1); /* the base alone */
    serve_resp_free(&r);
    /* the result */
    struct store_version v;
    const struct store_quality q = { 1, NAN, NAN, -1 };
    ok(store_job_succeed(s->st, run.id, run.claim, NULL, a, &q, true, &v, &err));
    store_version_free(&v);
    call(s, "GET", path_of(id, ""), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "succeeded");
    assert_string_equal(text_at(&r, "lorad.version"), "poet@1");
    snprintf(model, sizeof model, "%s", text_at(&r, "fine_tuned_model"));
    assert_true(json_is_null(at(&r, "estimated_finish")));
    serve_resp_free(&r);
    snprintf(body, sizeof body, "{\"model\":\"%s\",\"prompt\":\"The sea\",\"max_tokens\":4,"
             "\"temperature\":0}", model);
    call(s, "POST", "/v1/completions", body, NULL, &r);
    assert_string_equal(text_at(&r, "choices.0.text"), said);
    serve_resp_free(&r);
    snprintf(path, sizeof path, "/v1/models/%s", model);
    call(s, "GET", path, NULL, NULL, &r);
    assert_string_equal(text_at(&r, "root"), "poet@1");
    serve_resp_free(&r);
    call(s, "GET", "/v1/adapters/poet", NULL, NULL, &r);
    assert_string_equal(text_at(&r, "origin"), "train");
    assert_string_equal(text_at(&r, "training.job"), id);
    assert_float_equal(json_number_value(at(&r, "training.train_loss")), 1, 1e-9);
    assert_true(json_is_null(at(&r, "training.eval_loss")));
    serve_resp_free(&r);
    free(said);
    adapter_src_free(a);
    store_job_free(&run);
}

static void a_failure_is_told(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1];
    make_job(s, "{" OK "}", id);
    struct store_job run = start(s);
    ok(store_job_fail(s->st, run.id, run.claim, NULL, "invalid_training_file", "line 1 is too long",
                      "training_file", &err));
    call(s, "GET", path_of(id, ""), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "status"), "failed");
    assert_string_equal(text_at(&r, "error.code"), "invalid_training_file");
    assert_string_equal(text_at(&r, "error.message"), "line 1 is too long");
    assert_string_equal(text_at(&r, "error.param"), "training_file");
    assert_true(json_is_null(at(&r, "fine_tuned_model")));
    serve_resp_free(&r);
    call(s, "GET", path_of(id, "/events?limit=1"), NULL, NULL, &r);
    assert_string_equal(text_at(&r, "data.0.level"), "error");
    serve_resp_free(&r);
    store_job_free(&run);
}

/* --- streams ------------------------------------------------------------------------------------------ */
struct fake {
    struct serve *s;
    struct store *st;
    char id[STORE_ID_MAX + 1];
};

/* A run in another thread, while the stream is open. */
static void *fake_run(void *ud)
{
    struct fake *f = ud;
    struct serve with = *f->s; /* the same server, another connection */
    with.st = f->st;
    usleep(300 * 1000);
    struct store_job run = start(&with);
    for (int i = 1; i <= 3; i++) {
        step(&with, &run, i, 4 - i);
        usleep(200 * 1000);
    }
    ok(store_job_fail(f->st, run.id, run.claim, NULL, "c", "enough", NULL, &err));
    store_job_free(&run);
    return NULL;
}

static int count(const char *text, const char *part)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, part)) != NULL; p += strlen(part))
        n++;
    return n;
}

static void events_are_streamed_as_they_happen(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    struct fake f = { .s = s };
    pthread_t t;
    make_job(s, "{" OK "}", f.id);
    ok(store_open(s->db_path, &f.st, &err));
    assert_int_equal(pthread_create(&t, NULL, fake_run, &f), 0);
    call(s, "GET", path_of(f.id, "/events"), NULL, "Accept: text/event-stream", &r);
    pthread_join(t, NULL);
    assert_int_equal(r.status, 200);
    assert_string_equal(r.raw.type, "text/event-stream");
    /* created, validating, started, three steps, failed: each once and in order */
    assert_int_equal(count(r.text, "\ndata: {"), 7);
    const char *p = r.text;
    for (int i = 1; i <= 7; i++) {
        char id[24];
        snprintf(id, sizeof id, "id: %d\ndata: {", i);
        p = strstr(p, id);
        assert_non_null(p);
    }
    assert_non_null(strstr(p, "enough"));
    assert_string_equal(r.text + r.len - 14, "data: [DONE]\n\n");
    serve_resp_free(&r);
    /* what ended is there at once; a client that lost the stream goes on after what it has */
    call(s, "GET", path_of(f.id, "/events?stream=true"), NULL, "Last-Event-ID: 5", &r);
    assert_int_equal(count(r.text, "data: {"), 2);
    assert_memory_equal(r.text, "id: 6\n", 6);
    serve_resp_free(&r);
    store_close(f.st);
}

static void *fake_drain(void *ud)
{
    struct serve *s = ud;
    usleep(300 * 1000);
    api_set_draining(s->api);
    return NULL;
}

static void a_long_past_comes_in_pieces_and_whole(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1], last[24];
    make_job(s, "{" OK "}", id);
    struct store_job run = start(s);
    for (int i = 1; i <= 250; i++) /* a piece has 100 */
        step(s, &run, i, 2);
    ok(store_job_fail(s->st, run.id, run.claim, NULL, "c", "enough", NULL, &err));
    call(s, "GET", path_of(id, "/events?stream=true"), NULL, NULL, &r);
    assert_int_equal(count(r.text, "data: {"), 254);
    const char *p = r.text;
    for (int i = 1; i <= 254; i++) {
        snprintf(last, sizeof last, "id: %d\n", i);
        p = strstr(p, last);
        assert_non_null(p);
    }
    serve_resp_free(&r);
    store_job_free(&run);
}

static void a_stream_ends_when_the_server_stops(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    char id[STORE_ID_MAX + 1];
    make_job(s, "{" OK "}", id);
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, fake_drain, s), 0);
    call(s, "GET", path_of(id, "/events?stream=true"), NULL, NULL, &r);
    pthread_join(t, NULL);
    assert_int_equal(r.status, 200);
    assert_null(strstr(r.text, "[DONE]"));
    serve_resp_free(&r);
}

/* --- tenants ------------------------------------------------------------------------------------------ */
static void nobody_sees_anothers_files_and_jobs(void **state)
{
    struct serve *s = *state;
    struct serve_resp r;
    int64_t acme, beta, id;
    char key[2][STORE_KEY_LEN + 1], file[STORE_ID_MAX + 1], job[STORE_ID_MAX + 1], path[160];
    ok(store_tenant_add(s->st, "acme", &acme, &err));
    ok(store_tenant_add(s->st, "beta", &beta, &err));
    ok(store_key_create(s->st, acme, "a", key[0], &id, &err));
    ok(store_key_create(s->st, beta, "b", key[1], &id, &err));
    snprintf(key_header, sizeof key_header, "Authorization: Bearer %s", key[0]);
    add_file(s, "fine-tune", file);
    create(s, "{" OK ",\"suffix\":\"poet\"}", file, &r);
    snprintf(job, sizeof job, "%s", text_at(&r, "id"));
    assert_string_equal(text_at(&r, "organization_id"), "acme");
    serve_resp_free(&r);
    struct store_job run = start(s);
    struct adapter_src *a = demo_adapter(s);
    const struct store_checkpoint_new c = { .step = 1, .state = "s", .state_len = 1, .adapter = a };
    ok(store_job_checkpoint(s->st, run.id, run.claim, NULL, &c, &err));
    char *model = store_job_model_name(&run, 1);
    static const struct { const char *method, *path; } asked[] = {
        { "GET", F "/%s" }, { "GET", F "/%s/content" }, { "DELETE", F "/%s" }, { "GET", F "?after=%s" },
        { "GET", J "/%s" }, { "POST", J "/%s/cancel" }, { "POST", J "/%s/pause" },
        { "POST", J "/%s/resume" }, { "GET", J "/%s/events" }, { "GET", J "/%s/events?stream=true" },
        { "GET", J "/%s/checkpoints" }, { "GET", J "/%s/metrics" }, { "DELETE", J "/%s" },
        { "GET", J "?after=%s" },
        { "GET", "/v1/models/%s" }, { "GET", "/v1/adapters/%s" }, { "GET", "/v1/adapters/%s/download" },
    };
    snprintf(key_header, sizeof key_header, "Authorization: Bearer %s", key[1]);
    for (size_t i = 0; i < sizeof asked / sizeof asked[0]; i++) {
        snprintf(path, sizeof path, asked[i].path, i < 4 ? file : i < 14 ? job : model);
        call(s, asked[i].method, path, NULL, NULL, &r);
        if (r.status != 404)
            fail_msg("%s %s: %d", asked[i].method, path, r.status);
        serve_resp_free(&r);
    }
    create(s, "{" OK "}", file, &r);
    expect(&r, 400, file);
    serve_resp_free(&r);
    call(s, "GET", J, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
    call(s, "GET", F, NULL, NULL, &r);
    assert_int_equal(json_array_size(at(&r, "data")), 0);
    serve_resp_free(&r);
    key_header[0] = '\0'; /* and without a key nobody anything */
    call(s, "GET", J, NULL, NULL, &r);
    assert_int_equal(r.status, 401);
    serve_resp_free(&r);
    call(s, "GET", F, NULL, NULL, &r);
    assert_int_equal(r.status, 401);
    serve_resp_free(&r);
    snprintf(key_header, sizeof key_header, "Authorization: Bearer %s", key[0]);
    snprintf(path, sizeof path, "/v1/models/%s", model);
    call(s, "GET", path, NULL, NULL, &r);
    assert_int_equal(r.status, 200);
    serve_resp_free(&r);
    snprintf(path, sizeof path, F "/%s", file);
    call(s, "DELETE", path, NULL, NULL, &r);
    expect(&r, 409, "cancel it first");
    serve_resp_free(&r);
    key_header[0] = '\0';
    free(model);
    adapter_src_free(a);
    store_job_free(&run);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_file_goes_in_and_comes_back),
        T(files_that_are_no_good_are_refused_by_name),
        T(files_are_paged_in_both_orders),
        T(what_is_wrong_with_a_request_is_named),
        T(openais_request_gives_openais_job),
        cmocka_unit_test(options_written_and_read_again_are_the_same),
        T(training_goes_on_from_a_version),
        T(the_same_key_makes_one_job),
        T(the_same_key_gives_its_job_when_its_file_is_gone),
        T(jobs_are_bounded_per_tenant),
        T(jobs_are_listed_newest_first),
        T(what_cannot_be_asked_is_refused),
        T(a_job_is_paused_resumed_cancelled_deleted),
        T(a_run_is_seen_from_start_to_end_and_its_adapter_answers),
        T(a_failure_is_told),
        T(events_are_streamed_as_they_happen),
        T(a_long_past_comes_in_pieces_and_whole),
        T(a_stream_ends_when_the_server_stops),
        T(nobody_sees_anothers_files_and_jobs),
    };
    return cmocka_run_group_tests_name("api_jobs", tests, NULL, NULL);
}
