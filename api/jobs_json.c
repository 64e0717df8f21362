/* jobs_json.c - the shapes of fine-tuning: OpenAI's, with what is ours under `lorad`. */
#include "api/api_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

json_t *real_or_null(double v) { return isfinite(v) ? json_real(v) : json_null(); }

json_t *int_or_null(int64_t v) { return v >= 0 ? json_integer(v) : json_null(); }

static json_t *time_or_null(int64_t ms) { return ms > 0 ? json_integer(ms / 1000) : json_null(); }

/* Stored JSON; what cannot be read (it was when it was written) is null. */
static json_t *stored(const char *text)
{
    json_t *j = text != NULL ? json_loads(text, JSON_DECODE_ANY, NULL) : NULL;
    return j != NULL ? j : json_null();
}

/* OpenAI knows no pause: a paused job is queued, or running once it has run. */
static const char *openai_status(const struct store_job *j)
{
    if (j->status != JOB_PAUSED)
        return job_status_name(j->status);
    return j->started_ms > 0 ? "running" : "queued";
}

static json_t *estimate_json(const struct store_job *j)
{
    if (j->status != JOB_RUNNING || !(j->seconds_per_step > 0) || j->steps < j->step ||
        j->steps == 0)
        return json_null();
    const double left = (double)(j->steps - j->step) * j->seconds_per_step;
    if (left > 1e9)
        return json_null();
    return json_integer(now_unix_ms() / 1000 + (json_int_t)left);
}

static json_t *error_of(const struct store_job *j)
{
    if (j->error_code == NULL)
        return json_null();
    return json_pack("{s:s, s:s?, s:s?}", "code", j->error_code, "message", j->error_message,
                     "param", j->error_param);
}

static json_t *model_name(const struct store_job *j)
{
    char *name = j->status == JOB_SUCCEEDED ? store_job_model_name(j, -1) : NULL;
    json_t *s = name != NULL ? json_string(name) : json_null();
    free(name);
    return s;
}

static json_t *ours_json(const struct api *a, const struct store_job *j)
{
    static const char *const wanted[] = { [JOB_GO_ON] = "run", [JOB_PAUSE] = "pause",
                                          [JOB_CANCEL] = "cancel" };
    char result[STORE_NAME_MAX + 16] = "", hash[65];
    hex32(j->data_hash, hash);
    if (j->result_number > 0)
        snprintf(result, sizeof result, "%s@%d", j->name, j->result_number);
    json_t *base = json_pack("{s:s, s:s, s:b}", "name", j->base_name, "sha256", j->base_hash_hex,
                             "served_here", strcmp(j->base_hash_hex, a->o.base->hash_hex) == 0);
    return json_pack("{s:s, s:b, s:s?, s:s, s:s, s:s?, s:b, s:s?, s:I, s:I, s:o, s:o, s:o, s:b, s:o,"
                     " s:s, s:o, s:o}",
                     "status", job_status_name(j->status), "paused", j->status == JOB_PAUSED,
                     "pause_reason", j->pause_reason, "wanted", wanted[j->wanted], "name", j->name,
                     "version", result[0] != '\0' ? result : NULL, "version_exists",
                     j->result_version != 0, "from", j->from_ref, "step", (json_int_t)j->step,
                     "steps", (json_int_t)j->steps, "started_at", time_or_null(j->started_ms),
                     "seconds_per_step",
                     j->seconds_per_step > 0 ? json_real(j->seconds_per_step) : json_null(), "base",
                     base, "activate", j->activate, "activate_if", stored(j->activate_if),
                     "data_sha256", hash, "checkpoint_step", int_or_null(j->state_step), "params",
                     stored(j->params));
}

/* No suffix was given: the name is made of the job's id. */
static bool own_name(const struct store_job *j)
{
    return strncmp(j->name, "ft-", 3) == 0 && strcmp(j->name + 3, j->ref + strlen("ftjob-")) == 0;
}

json_t *job_json(const struct api *a, const struct store_job *j)
{
    return json_pack("{s:s, s:s, s:I, s:o, s:s, s:o, s:s, s:s, s:s, s:s?, s:[], s:o, s:I, s:o, s:o,"
                     " s:o, s:[], s:o, s:o, s:s?, s:o}",
                     "object", "fine_tuning.job", "id", j->ref, "created_at",
                     (json_int_t)(j->created_ms / 1000), "finished_at",
                     time_or_null(j->finished_ms), "model", j->model, "fine_tuned_model",
                     model_name(j), "organization_id", j->tenant_name, "status", openai_status(j),
                     "training_file", j->training_file, "validation_file",
                     j->validation_file[0] != '\0' ? j->validation_file : NULL, "result_files",
                     "trained_tokens",
                     j->trained_tokens > 0 ? json_integer(j->trained_tokens) : json_null(), "seed",
                     (json_int_t)j->seed, "estimated_finish", estimate_json(j), "hyperparameters",
                     stored(j->hyperparameters), "method", stored(j->method), "integrations",
                     "metadata", stored(j->metadata), "error", error_of(j), "user_provided_suffix",
                     own_name(j) ? NULL : j->name, "lorad", ours_json(a, j));
}

/* --- parts of a job: ids are made of its own, so that one can be told from another's --------- */
static const char event_prefix[] = "ftevent-", checkpoint_prefix[] = "ftckpt_";

static void part_id(const struct store_job *j, const char *prefix, int64_t n, char ret[64])
{
    snprintf(ret, 64, "%s%s-%lld", prefix, j->ref + strlen("ftjob-"), (long long)n);
}

int job_part_id(const struct store_job *j, const char *prefix, const char *id, int64_t *ret,
                struct err *err)
{
    char want[64];
    const char *dash = strrchr(id, '-');
    int64_t n = -1;
    if (dash != NULL && strlen(dash + 1) >= 1 && strlen(dash + 1) <= 15 &&
        strspn(dash + 1, "0123456789") == strlen(dash + 1))
        n = strtoll(dash + 1, NULL, 10);
    part_id(j, prefix, n, want);
    if (n < 0 || strcmp(want, id) != 0)
        return err_set_slug(err, ERR_INVALID, NULL, "after",
                            "`after`: \"%.80s\" is not an id of this job's list", id);
    *ret = n;
    return ERR_OK;
}

json_t *job_event_json(const struct store_job *j, const struct store_event *e)
{
    static const char *const levels[] = { [JOB_INFO] = "info", [JOB_WARN] = "warn",
                                          [JOB_ERROR] = "error" };
    char id[64];
    part_id(j, event_prefix, e->seq, id);
    return json_pack("{s:s, s:s, s:I, s:s, s:o, s:s, s:o}", "object", "fine_tuning.job.event", "id",
                     id, "created_at", (json_int_t)(e->at_ms / 1000), "level", levels[e->level],
                     "message", json_text(e->message ? e->message : "",
                                          e->message ? strlen(e->message) : 0),
                     "type", e->metrics ? "metrics" : "message", "data", stored(e->data));
}

/* OpenAI's names; what was not measured is left out, as there. */
static json_t *checkpoint_metrics(const struct store_checkpoint *c)
{
    const struct { const char *name; double v; } all[] = {
        { "train_loss", c->train_loss }, { "train_mean_token_accuracy", c->train_accuracy },
        { "valid_loss", c->valid_loss }, { "valid_mean_token_accuracy", c->valid_accuracy },
        { "full_valid_loss", c->valid_loss },
        { "full_valid_mean_token_accuracy", c->valid_accuracy },
    };
    json_t *m = json_pack("{s:I}", "step", (json_int_t)c->step);
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (isfinite(all[i].v))
            json_object_set_new(m, all[i].name, json_real(all[i].v));
    return m;
}

json_t *job_checkpoint_json(const struct store_job *j, const struct store_checkpoint *c)
{
    char id[64];
    char *model = store_job_model_name(j, c->step);
    part_id(j, checkpoint_prefix, c->step, id);
    json_t *out = json_pack("{s:s, s:s, s:I, s:s?, s:s, s:I, s:o}", "object",
                            "fine_tuning.job.checkpoint", "id", id, "created_at",
                            (json_int_t)(c->created_ms / 1000), "fine_tuned_model_checkpoint",
                            model, "fine_tuning_job_id", j->ref, "step_number",
                            (json_int_t)c->step, "metrics", checkpoint_metrics(c));
    free(model);
    return out;
}

json_t *job_metric_json(const struct store_metric *m)
{
    return json_pack("{s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
                     "step", (json_int_t)m->step, "epoch", real_or_null(m->epoch), "loss",
                     real_or_null(m->loss), "valid_loss", real_or_null(m->valid_loss), "accuracy",
                     real_or_null(m->accuracy), "valid_accuracy", real_or_null(m->valid_accuracy),
                     "lr", real_or_null(m->lr), "grad_norm", real_or_null(m->grad_norm),
                     "tokens_per_s", real_or_null(m->tokens_per_s), "tokens",
                     int_or_null(m->tokens), "targets", int_or_null(m->targets), "orth",
                     real_or_null(m->orth), "threshold", real_or_null(m->threshold), "budget",
                     int_or_null(m->budget), "kept", int_or_null(m->kept));
}
