/* peft_fields.c - every field that an adapter_config.json may have, and what becomes of it.
 *
 * A field is honoured, noted, or refused; a field that is not in the table may only say nothing
 * (null, false, empty).  docs/adapters.md is made from this table and a test compares the two. */
#include "engine/peft_int.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct peft_field peft_fields[] = {
    /* What decides the answer. */
    { "peft_type", FIELD_HONOURED, FOR_BOTH, NULL, "(required)", "LORA or ADALORA" },
    { "task_type", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "CAUSAL_LM or null; a classifier has no next token to give" },
    { "r", FIELD_HONOURED, FOR_BOTH, NULL, "8",
      "rank, 1 to 4096; AdaLoRA does not use it (PEFT ignores it there too)" },
    { "lora_alpha", FIELD_HONOURED, FOR_BOTH, NULL, "8",
      "any finite number; scaling is alpha / r" },
    { "use_rslora", FIELD_HONOURED, FOR_LORA, NULL, "false", "scaling is alpha / sqrt(r)" },
    { "rank_pattern", FIELD_HONOURED, FOR_BOTH, NULL, "{}",
      "LoRA: regex to rank, the first key that matches wins, in the order of the file; AdaLoRA: "
      "the mask of kept triplets per module" },
    { "alpha_pattern", FIELD_HONOURED, FOR_LORA, NULL, "{}",
      "regex to alpha, the first key that matches wins, in the order of the file" },
    { "target_modules", FIELD_HONOURED, FOR_BOTH, NULL, "(required)",
      "list of names or path ends, a regex that matches a whole path, or \"all-linear\"" },
    { "exclude_modules", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "list or regex; goes before target_modules" },
    { "layers_to_transform", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "number or list; only with a list of target_modules, as in PEFT" },
    { "layers_pattern", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "where the layer number stands in a path; only with layers_to_transform" },
    { "init_lora_weights", FIELD_HONOURED, FOR_BOTH, NULL, "true",
      "true, false, gaussian, orthogonal and eva leave the base alone; pissa, olora, corda, "
      "lora_ga, loftq and unknown ones changed the base weights and are refused" },
    { "use_dora", FIELD_HONOURED, FOR_LORA, NULL, "false",
      "magnitude vectors; linear layers and the head, without lora_bias" },
    { "bias", FIELD_HONOURED, FOR_BOTH, NULL, "\"none\"",
      "none; lora_only: biases of adapted layers are replaced; all: every bias of the base" },
    { "lora_bias", FIELD_HONOURED, FOR_LORA, NULL, "false",
      "biases inside lora_B, added times the scaling" },
    { "modules_to_save", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "list of names: the embedding, the head and norms are replaced; linear layers of the blocks "
      "and what this base has not got (a classifier's score) are refused" },
    { "trainable_token_indices", FIELD_HONOURED, FOR_BOTH, NULL, "null",
      "list: these rows of the embedding, and of a tied head, are replaced; or lists by the names of "
      "the embedding and the head" },
    { "enable_lora", FIELD_HONOURED, FOR_LORA, NULL, "null",
      "MergedLinear of the first versions of PEFT: becomes plain LoRA of rank r times the parts that "
      "are on; in linear layers of the blocks, without bias and what came later" },
    { "ensure_weight_tying", FIELD_HONOURED, FOR_BOTH, NULL, "false",
      "refused if the base's head is its embedding and LoRA or modules_to_save changes one of them; "
      "with trainable_token_indices both are one anyway" },
    { "init_r", FIELD_HONOURED, FOR_ADALORA, NULL, "12",
      "rank before pruning, 1 to 4096; scaling is alpha / (init_r + 1e-5) whatever was pruned" },
    /* What is kept with the version and changes nothing. */
    { "base_model_name_or_path", FIELD_NOTED, FOR_BOTH, NULL, "null",
      "shown as the base that the adapter claims" },
    { "revision", FIELD_NOTED, FOR_BOTH, NULL, "null", "of the base on the hub" },
    { "peft_version", FIELD_NOTED, FOR_BOTH, NULL, "null", "what wrote the file" },
    { "auto_mapping", FIELD_NOTED, FOR_BOTH, NULL, "null", "Python class names" },
    { "inference_mode", FIELD_NOTED, FOR_BOTH, NULL, "false", "whether PEFT froze the adapter" },
    { "lora_dropout", FIELD_NOTED, FOR_BOTH, NULL, "0", "training only" },
    { "eva_config", FIELD_NOTED, FOR_BOTH, NULL, "null", "how the start values were found" },
    { "megatron_core", FIELD_NOTED, FOR_BOTH, NULL, "\"megatron.core\"",
      "a module name, used only with megatron_config" },
    { "qalora_group_size", FIELD_NOTED, FOR_BOTH, NULL, "16", "used only with use_qalora" },
    { "runtime_config", FIELD_NOTED, FOR_BOTH, NULL, "null",
      "where PEFT computes; PEFT ignores it in files" },
    { "merge_weights", FIELD_NOTED, FOR_BOTH, NULL, "false",
      "when the first versions of PEFT merged" },
    { "target_r", FIELD_NOTED, FOR_ADALORA, NULL, "8",
      "AdaLoRA's schedule, shown with the version" },
    { "tinit", FIELD_NOTED, FOR_ADALORA, NULL, "0", "AdaLoRA's schedule" },
    { "tfinal", FIELD_NOTED, FOR_ADALORA, NULL, "0", "AdaLoRA's schedule" },
    { "deltaT", FIELD_NOTED, FOR_ADALORA, NULL, "1", "AdaLoRA's schedule" },
    { "beta1", FIELD_NOTED, FOR_ADALORA, NULL, "0.85", "AdaLoRA's schedule" },
    { "beta2", FIELD_NOTED, FOR_ADALORA, NULL, "0.85", "AdaLoRA's schedule" },
    { "orth_reg_weight", FIELD_NOTED, FOR_ADALORA, NULL, "0.5", "AdaLoRA's schedule" },
    { "total_step", FIELD_NOTED, FOR_ADALORA, NULL, "null", "AdaLoRA's schedule" },
    /* What this server does not compute. */
    { "fan_in_fan_out", FIELD_REFUSED, FOR_BOTH, NULL, "false",
      "about layers that are stored transposed: GPT-2 has them, and there either value is right" },
    { "target_parameters", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "only linear layers can be adapted, not bare parameters" },
    { "layer_replication", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "the base would have other layers" },
    { "alora_invocation_tokens", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "an adapter that starts in the middle of a prompt is not computed" },
    { "alora_invocation_string", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "an adapter that starts in the middle of a prompt is not computed" },
    { "use_qalora", FIELD_REFUSED, FOR_BOTH, NULL, "false",
      "QALoRA pools the input before lora_A" },
    { "use_bdlora", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "block-diagonal factors are not computed" },
    { "arrow_config", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "routing between adapters per token is not computed" },
    { "kasa_config", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "KaSA changes the base and adds singular values" },
    { "velora_config", FIELD_REFUSED, FOR_BOTH, NULL, "null", "VeLoRA is not computed" },
    { "monteclora_config", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "sampled adapter weights are not computed" },
    { "megatron_config", FIELD_REFUSED, FOR_BOTH, NULL, "null",
      "layers of Megatron are not supported" },
    { "loftq_config", FIELD_REFUSED, FOR_BOTH, NULL, "{}", "LoftQ changed the base weights" },
    { "corda_config", FIELD_REFUSED, FOR_BOTH, NULL, "null", "CorDA changed the base weights" },
    { "lora_ga_config", FIELD_REFUSED, FOR_BOTH, NULL, "null", "LoRA-GA changed the base weights" },
    { NULL, FIELD_REFUSED, FOR_BOTH, NULL, NULL, NULL },
};

const char *peft_show(const char *s, char ret[128])
{
    size_t n = 0;
    for (; *s != '\0' && n < 120; s++)
        ret[n++] = isprint((unsigned char)*s) ? *s : '?';
    ret[n] = '\0';
    if (*s != '\0')
        memcpy(ret + n, "...", 4);
    return ret;
}

const char *peft_show_json(const json_t *v, char ret[128])
{
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    peft_show(text != NULL ? text : "?", ret);
    free(text);
    return ret;
}

json_t *peft_number(double v)
{
    return v == floor(v) && fabs(v) < 1e15 ? json_integer((json_int_t)v) : json_real(v);
}

bool peft_says_nothing(const json_t *v)
{
    return v == NULL || json_is_null(v) || json_is_false(v) ||
           (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

static const struct peft_field *field_find(const char *name)
{
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++)
        if (strcmp(f->name, name) == 0)
            return f;
    return NULL;
}

static int refuse_field(const char *name, const json_t *v, const char *why, struct err *err)
{
    char shown_name[128], shown[128];
    return peft_refuse(err, "adapter_config.json: %s is %s: %s", peft_show(name, shown_name),
                       peft_show_json(v, shown), why);
}

static int field_check(const char *name, const json_t *v, bool adalora, struct err *err)
{
    const struct peft_field *f = field_find(name);
    if (peft_says_nothing(v))
        return ERR_OK;
    if (f == NULL)
        return refuse_field(name, v, "this server does not know the field", err);
    if (f->method == FOR_LORA && adalora)
        return refuse_field(name, v, "AdaLoRA has no such setting", err);
    if (f->method == FOR_ADALORA && !adalora)
        return refuse_field(name, v, "only AdaLoRA has this setting, and peft_type is LORA", err);
    if (f->kind != FIELD_REFUSED || strcmp(name, "fan_in_fan_out") == 0)
        return ERR_OK;
    if (f->off != NULL && json_is_string(v) && strcmp(json_string_value(v), f->off) == 0)
        return ERR_OK;
    return refuse_field(name, v, f->why, err);
}

int peft_fields_check(json_t *root, bool adalora, struct err *err)
{
    const char *name;
    json_t *v;
    json_object_foreach(root, name, v)
    {
        int rc = field_check(name, v, adalora, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

int peft_fan_in_check(json_t *root, struct err *err)
{
    static const char name[] = "fan_in_fan_out";
    const json_t *v = json_object_get(root, name);
    return peft_says_nothing(v) ? ERR_OK
                                        : refuse_field(name, v, field_find(name)->why, err);
}

int peft_fields_markdown(struct buf *ret)
{
    static const char *const kind[] = { "honoured", "noted", "refused if set" };
    static const char *const method[] = { "", "LoRA: ", "AdaLoRA: " };
    int rc = buf_puts(ret, "| field | | when absent | |\n|---|---|---|---|\n");
    for (const struct peft_field *f = peft_fields; rc == ERR_OK && f->name != NULL; f++)
        rc = buf_printf(ret, "| `%s` | %s | `%s` | %s%s |\n", f->name, kind[f->kind], f->fallback,
                        method[f->method], f->why);
    return rc;
}
