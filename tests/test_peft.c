/* test_peft.c - an adapter's config and tensors are honoured or refused, each by name.
 *
 * Names that regular expressions match were worked out with Python's re, in the way PEFT uses it
 * (re.match of "(.*\.)?(P)$", re.fullmatch).  LORAD_WRITE_DOCS=1 makes the test of the document
 * write the table into docs/adapters.md instead of comparing it. */
#include "engine/peft_int.h"
#include "tests/support_adapter.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { TENSORS = 64 };

static const char lora_config[] = "{\"peft_type\":\"LORA\",\"task_type\":\"CAUSAL_LM\",\"r\":2,"
                                  "\"lora_alpha\":4,\"target_modules\":[\"q_proj\"]}";
static const char ada_config[] = "{\"peft_type\":\"ADALORA\",\"task_type\":\"CAUSAL_LM\","
                                 "\"init_r\":2,\"lora_alpha\":4,\"target_modules\":[\"q_proj\"]}";

/* lora_config (or ada_config) with one field set to a JSON value (NULL: removed). */
static char *config_with(bool ada, const char *field, const char *value)
{
    json_t *root = json_loads(ada ? ada_config : lora_config, 0, NULL);
    assert_non_null(root);
    if (value == NULL)
        json_object_del(root, field);
    else
        json_object_set_new(root, field, json_loads(value, JSON_DECODE_ANY, NULL));
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    assert_non_null(text);
    return text;
}

/* Parse a config against rank-2 tensors for q_proj.  The message goes to msg; the hash of what
 * came out to hash. */
static int parse_q(bool ada, const char *config, char msg[512], uint8_t hash[32])
{
    struct arch arch;
    support_small_arch(&arch);
    struct support_tensor t[TENSORS];
    size_t n = support_lora_tensors(&arch, "q_proj", 2, ada, "F32", t, TENSORS);
    struct adapter_src *a = NULL;
    struct err err = { 0 };
    int rc = support_parse(&arch, config, t, n, &a, &err);
    snprintf(msg, 512, "%s", err.msg);
    if (rc == ERR_OK)
        memcpy(hash, a->hash, 32);
    adapter_src_free(a);
    return rc;
}

static int parse_field(bool ada, const char *field, const char *value, char msg[512],
                       uint8_t hash[32])
{
    char *config = config_with(ada, field, value);
    int rc = parse_q(ada, config, msg, hash);
    free(config);
    return rc;
}

/* --- the table of fields ---------------------------------------------------------------------- */

static void every_refused_field_is_refused_by_name_when_it_is_set(void **state)
{
    (void)state;
    const char *const values[] = { "true", "\"lora_only\"", "[1]", "{\"a\":1}", "7" };
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        for (size_t i = 0; f->kind == FIELD_REFUSED && i < sizeof values / sizeof values[0]; i++) {
            char msg[512];
            uint8_t hash[32];
            int rc = parse_field(f->method == FOR_ADALORA, f->name, values[i], msg, hash);
            if (rc != ERR_INVALID || strstr(msg, f->name) == NULL || strstr(msg, f->why) == NULL)
                fail_msg("%s = %s: %d \"%s\"", f->name, values[i], rc, msg);
        }
    }
}

static void every_refused_field_is_accepted_when_it_says_nothing(void **state)
{
    (void)state;
    const char *const values[] = { "null", "false", "\"\"", "[]", "{}" };
    char msg[512];
    uint8_t plain[32], hash[32];
    assert_int_equal(parse_q(false, lora_config, msg, plain), ERR_OK);
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        if (f->kind != FIELD_REFUSED)
            continue;
        for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
            if (parse_field(false, f->name, values[i], msg, hash) != ERR_OK)
                fail_msg("%s = %s: %s", f->name, values[i], msg);
            assert_memory_equal(hash, plain, 32);
        }
        if (f->off != NULL) {
            char quoted[64];
            snprintf(quoted, sizeof quoted, "\"%s\"", f->off);
            assert_int_equal(parse_field(false, f->name, quoted, msg, hash), ERR_OK);
        }
    }
}

static void every_noted_field_changes_nothing(void **state)
{
    (void)state;
    char msg[512];
    uint8_t plain[2][32], hash[32];
    assert_int_equal(parse_q(false, lora_config, msg, plain[0]), ERR_OK);
    assert_int_equal(parse_q(true, ada_config, msg, plain[1]), ERR_OK);
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        if (f->kind != FIELD_NOTED)
            continue;
        bool ada = f->method == FOR_ADALORA;
        if (parse_field(ada, f->name, ada ? "3" : "\"x\"", msg, hash) != ERR_OK)
            fail_msg("%s: %s", f->name, msg);
        assert_memory_equal(hash, plain[ada], 32);
    }
}

/* Per honoured field: a value that is honoured (it changes the content, unless `same`), and one
 * that is refused. */
static const struct {
    const char *field, *good, *bad;
    bool ada, same;
} honoured[] = {
    { "peft_type", "\"LORA\"", "\"LOHA\"", false, true },
    { "peft_type", "\"LORA\"", "null", false, true },
    { "task_type", "null", "\"SEQ_CLS\"", false, true },
    { "r", "2", "0", false, true },
    { "r", "2", "4097", false, true },
    { "r", "2", "2.0", false, true },
    { "r", "2", "4", false, true }, /* tensors have rank 2 */
    { "lora_alpha", "5", "\"16\"", false, false },
    { "lora_alpha", "2.5", "true", false, false },
    { "lora_alpha", "-1", "[]", false, false },
    { "use_rslora", "true", "\"yes\"", false, false },
    { "rank_pattern", "{\"q_proj\": 2}", "{\"q_proj\": 3}", false, true },
    { "rank_pattern", "{\"down_proj\": 9}", "{\"q_proj\": true}", false, true },
    { "rank_pattern", "null", "{\"q_proj\": 0}", false, true },
    { "rank_pattern", "{}", "[2]", false, true },
    { "rank_pattern", "{\"model.layers.0.self_attn.q_proj.lora_E\": [true, true]}",
      "{\"model.layers.0.self_attn.q_proj.lora_E\": [true, false]}", true, true },
    { "alpha_pattern", "{\"1.self_attn.q_proj\": 1.5}", "{\"q_proj\": \"1\"}", false, false },
    { "alpha_pattern", "{\"v_proj\": 3}", "7", false, true },
    { "target_modules", "[\"self_attn.q_proj\"]", "null", false, true },
    { "target_modules", "[\"q_proj\", \"Wqkv\"]", "[]", false, true },
    { "target_modules", "\".*q_proj\"", "[\"c_attn\"]", false, true },
    { "target_modules", "[\"q_proj\"]", "[\"q_proj\", 1]", false, true },
    { "target_modules", "[\"q_proj\"]", "\"all-linear\"", false,
      true }, /* others have no tensors */
    { "target_modules", "[\"q_proj\"]", "[\"q_proj\", \"lm_head\"]", false, true },
    { "target_modules", "[\"q_proj\"]", "[\"q_proj\", \"embed_tokens\"]", false, true },
    { "target_modules", "[\"q_proj\"]", "[\"v_proj\"]", false, true }, /* whose are they? */
    { "exclude_modules", "[\"v_proj\"]", "[\"q_proj\"]", false, true },
    { "exclude_modules", "\".*v_proj\"", "\".*0.self_attn.q_proj\"", false, true },
    { "layers_to_transform", "[0, 1]", "[0]", false, true },
    { "layers_to_transform", "[0, 1, 7]", "\"all\"", false, true },
    { "layers_to_transform", "null", "1", false, true },
    { "layers_pattern", "null", "\"layers\"", false, true }, /* without layers_to_transform */
    { "init_lora_weights", "true", "\"pissa\"", false, true },
    { "init_lora_weights", "false", "\"pissa_niter_16\"", false, true },
    { "init_lora_weights", "\"gaussian\"", "\"olora\"", false, true },
    { "init_lora_weights", "\"orthogonal\"", "\"corda\"", false, true },
    { "init_lora_weights", "\"eva\"", "\"lora_ga\"", false, true },
    { "init_lora_weights", "null", "\"loftq\"", false, true },
    { "init_lora_weights", "true", "\"something new\"", false, true },
    { "use_dora", "false", "true", false, true }, /* its magnitudes are not there */
    { "use_dora", "null", "\"yes\"", false, true },
    { "bias", "\"none\"", "\"some\"", false, true },
    { "bias", "\"lora_only\"", "true", false, true }, /* this base has no biases to replace */
    { "lora_bias", "false", "true", false, true },
    { "modules_to_save", "[]", "[\"score\"]", false, true },
    { "modules_to_save", "null", "[\"mlp\"]", false, true },
    { "modules_to_save", "null", "[\"o_proj\"]", false, true },
    { "modules_to_save", "null", "[\"lm.*\"]", false, true },
    { "modules_to_save", "null", "\"lm_head\"", false, true },
    { "trainable_token_indices", "null", "[3]", false, true }, /* there is no such tensor */
    { "trainable_token_indices", "[]", "{\"lm_head\":[16]}", false, true },
    { "trainable_token_indices", "{}", "7", false, true },
    { "enable_lora", "null", "[true,false]", false, true }, /* no such B */
    { "enable_lora", "[]", "[false,false,false]", false, true },
    { "enable_lora", "false", "[1,0]", false, true },
    { "enable_lora", "{}", "true", false, true },
    { "ensure_weight_tying", "true", "\"yes\"", false, true }, /* the base is not tied */
    { "init_r", "2", "3", true, true },
    { "init_r", "2", "0", true, true },
};

static void every_honoured_field_is_used_or_refused_by_name(void **state)
{
    (void)state;
    char msg[512];
    uint8_t plain[2][32], hash[32];
    assert_int_equal(parse_q(false, lora_config, msg, plain[0]), ERR_OK);
    assert_int_equal(parse_q(true, ada_config, msg, plain[1]), ERR_OK);
    for (size_t i = 0; i < sizeof honoured / sizeof honoured[0]; i++) {
        bool ada = honoured[i].ada;
        if (parse_field(ada, honoured[i].field, honoured[i].good, msg, hash) != ERR_OK)
            fail_msg("%s = %s: %s", honoured[i].field, honoured[i].good, msg);
        if ((memcmp(hash, plain[ada], 32) == 0) != honoured[i].same)
            fail_msg("%s = %s: content %s", honoured[i].field, honoured[i].good,
                     honoured[i].same ? "changed" : "did not change");
        int rc = parse_field(ada, honoured[i].field, honoured[i].bad, msg, hash);
        bool by_name = strstr(msg, honoured[i].field) != NULL ||
                       strstr(msg, "base_model.model.model.layers") != NULL;
        if (rc != ERR_INVALID || !by_name)
            fail_msg("%s = %s: %d \"%s\"", honoured[i].field, honoured[i].bad, rc, msg);
    }
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        bool tested = f->kind != FIELD_HONOURED;
        for (size_t i = 0; i < sizeof honoured / sizeof honoured[0]; i++)
            tested = tested || strcmp(honoured[i].field, f->name) == 0;
        if (!tested)
            fail_msg("%s has no test", f->name);
    }
}

static void a_field_of_the_other_method_is_refused(void **state)
{
    (void)state;
    char msg[512];
    uint8_t hash[32];
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        if (f->method == FOR_BOTH)
            continue;
        /* a value of the right type, so that the type is not what is refused */
        const char *value = strcmp(f->name, "use_rslora") == 0      ? "true"
                            : strcmp(f->name, "alpha_pattern") == 0 ? "{\"q_proj\": 3}"
                            : strcmp(f->name, "enable_lora") == 0   ? "[true]"
                                                                    : "3";
        int rc = parse_field(f->method == FOR_LORA, f->name, value, msg, hash);
        if (rc != ERR_INVALID || strstr(msg, f->name) == NULL)
            fail_msg("%s: %d \"%s\"", f->name, rc, msg);
    }
}

static void a_field_that_nobody_knows_is_refused_unless_it_says_nothing(void **state)
{
    (void)state;
    const char *const set[] = { "true", "1", "0.5", "\"x\"", "[0]", "{\"a\":null}" };
    const char *const nothing[] = { "null", "false", "\"\"", "[]", "{}" };
    char msg[512];
    uint8_t hash[32];
    for (size_t i = 0; i < sizeof set / sizeof set[0]; i++) {
        assert_int_equal(parse_field(false, "use_tomorrow", set[i], msg, hash), ERR_INVALID);
        assert_non_null(strstr(msg, "use_tomorrow"));
    }
    for (size_t i = 0; i < sizeof nothing / sizeof nothing[0]; i++)
        assert_int_equal(parse_field(false, "use_tomorrow", nothing[i], msg, hash), ERR_OK);
}

static void a_config_that_is_no_object_is_refused(void **state)
{
    (void)state;
    const char *const bad[] = {
        "",
        "[]",
        "3",
        "{",
        "{\"peft_type\":\"LORA\"",
        "{}",
        "null",
        "{\"peft_type\":\"LORA\",\"r\":8,\"r\":4,\"target_modules\":[\"q_proj\"]}",
        "{\"peft_type\":\"LORA\",\"lora_alpha\":NaN,\"target_modules\":[\"q_proj\"]}",
        "{\"peft_type\":\"LORA\",\"lora_alpha\":1e999,\"target_modules\":[\"q_proj\"]}",
        "{\"peft_type\":\"LORA\",\"lora_alpha\":1e300,\"target_modules\":[\"q_proj\"],\"r\":2}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char msg[512];
        uint8_t hash[32];
        int rc = parse_q(false, bad[i], msg, hash);
        if (rc != ERR_INVALID || msg[0] == '\0')
            fail_msg("\"%s\": %d \"%s\"", bad[i], rc, msg);
    }
}

/* --- names --------------------------------------------------------------------------------------
 */

static const char *const keys[] = { "model.layers.0.self_attn.q_proj",
                                    "model.layers.1.self_attn.v_proj",
                                    "model.layers.10.mlp.down_proj", "model.embed_tokens",
                                    "lm_head" };

/* One digit per key: does re.match("(.*\.)?(P)$") find it, does re.fullmatch(P)?  From Python. */
static const struct {
    const char *pattern, *match, *full;
} python[] = {
    { "q_proj", "10000", "00000" },
    { "down_proj", "00100", "00000" },
    { "layers.1.self_attn.v_proj", "01000", "00000" },
    { "^model.layers.0.self_attn.q_proj", "10000", "10000" },
    { "proj", "00000", "00000" },
    { "1.self_attn.v_proj", "01000", "00000" },
    { ".*\\.v_proj", "01000", "01000" },
    { "self_attn.(q|v)_proj", "11000", "00000" },
    { "layers\\.[01]\\.self_attn\\.[^k]_proj", "11000", "00000" },
    { "layers.\\d+.mlp.down_proj", "00100", "00000" },
    { "a)|(b", "00000", "error" },
    { "(?:q|k)_proj", "10000", "00000" },
    { "?:q_proj", "10000", "error" },
    { "[]q]_proj", "10000", "00000" },
    { "q_proj|v_proj", "11000", "00000" },
    { "layers.1", "00000", "00000" },
    { "(l)ayers.10.m\\1p.down_proj", "00000", "00000" },
    { "m_head", "00000", "00000" },
    { "lm_head", "00001", "00001" },
    { "\\w+_proj", "11100", "00000" },
    { "layers.\\d{2}.*", "00100", "00000" },
    { "", "00000", "00000" },
    { "model.layers.(?!0).*v_proj", "01000", "01000" },
    { "model.layers.(?!0\\.).*_proj$", "01100", "01100" },
    { "Q_proj", "00000", "00000" },
};

static struct peft_matcher *matcher(struct peft_config *c, const char *config)
{
    struct peft_matcher *m = NULL;
    struct err err = { 0 };
    *c = (struct peft_config){ .root = json_loads(config, 0, NULL), .r = 4, .alpha = 8 };
    assert_non_null(c->root);
    c->rank_pattern = json_object_get(c->root, "rank_pattern");
    c->alpha_pattern = json_object_get(c->root, "alpha_pattern");
    if (peft_matcher_create(c, &m, &err) != ERR_OK)
        m = NULL;
    return m;
}

static char *config_of(const char *target, const char *rank_key)
{
    json_t *root =
        json_pack("{s:s, s:{s:i}}", "target_modules", target, "rank_pattern", rank_key, 7);
    char *text = json_dumps(root, 0);
    json_decref(root);
    assert_non_null(text);
    return text;
}

static void patterns_match_as_they_do_in_python(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof python / sizeof python[0]; i++) {
        struct peft_config c;
        bool target_fails = strcmp(python[i].full, "error") == 0;
        char *text = config_of(target_fails ? "x" : python[i].pattern, python[i].pattern);
        struct peft_matcher *m = matcher(&c, text);
        if (m == NULL)
            fail_msg("\"%s\" is refused", python[i].pattern);
        for (size_t k = 0; k < 5; k++) {
            bool hit = false;
            int rank;
            double alpha;
            assert_int_equal(peft_matcher_rank(m, keys[k], &rank, &alpha, NULL), ERR_OK);
            if ((rank == 7) != (python[i].match[k] == '1'))
                fail_msg("rank_pattern \"%s\" on %s", python[i].pattern, keys[k]);
            assert_int_equal(peft_matcher_targets(m, keys[k], true, &hit, NULL), ERR_OK);
            if (!target_fails && hit != (python[i].full[k] == '1'))
                fail_msg("target_modules \"%s\" on %s", python[i].pattern, keys[k]);
        }
        peft_matcher_free(m);
        json_decref(c.root);
        free(text);
    }
}

/* What Python and PCRE2 read differently, or only one of them knows, or nobody does. */
static void patterns_that_might_mean_something_else_are_refused(void **state)
{
    (void)state;
    const char *const bad[] = {
        "\\Qq_proj\\E", "(?i)q_proj", "(?R)",    "(*UTF)q_proj", "q{,3}",  "[[:alpha:]]_proj",
        "\\h",          "\\x71_proj", "(?|a|b)", "(?<n>a)",      "(?#c)q", "\\p{Ll}",
        "\\K",          "\\N",        "\\0",     "(a)\\12",      "[a",     "(a",
        "a)",           "a\\",        "\\g{1}",  "\\v",          "q{ 1}",  "[\\x41]",
        "(?P>n)",       "(?1)",       "(?C1)a",  "**",           "(?>a)",  "\\C",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct peft_config c;
        char *text = config_of(bad[i], "x");
        if (matcher(&c, text) != NULL)
            fail_msg("\"%s\" is accepted", bad[i]);
        json_decref(c.root);
        free(text);
    }
}

static void a_pattern_that_takes_for_ever_is_refused(void **state)
{
    (void)state;
    struct peft_config c;
    char *text = config_of("(?:(?:.+)+)+[!?]", "(((.+)+)+)+[!?]");
    struct peft_matcher *m = matcher(&c, text);
    assert_non_null(m);
    bool hit;
    int rank;
    double alpha;
    struct err err = { 0 };
    assert_int_equal(peft_matcher_targets(m, keys[0], true, &hit, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "target_modules"));
    err_clear(&err);
    assert_int_equal(peft_matcher_rank(m, keys[0], &rank, &alpha, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "rank_pattern"));
    peft_matcher_free(m);
    json_decref(c.root);
    free(text);
}

static void the_first_pattern_of_the_file_wins(void **state)
{
    (void)state;
    struct peft_config c;
    struct peft_matcher *m =
        matcher(&c, "{\"target_modules\": [\"x\"], \"rank_pattern\": {\"z.*\": 1, \"v_proj\": 5,"
                    "\"1.self_attn.v_proj\": 6, \".*proj\": 7, \"a\": 9}}");
    int rank;
    double alpha;
    assert_int_equal(peft_matcher_rank(m, keys[1], &rank, &alpha, NULL), ERR_OK);
    assert_int_equal(rank, 5);
    assert_int_equal(peft_matcher_rank(m, keys[0], &rank, &alpha, NULL), ERR_OK);
    assert_int_equal(rank, 7);
    assert_int_equal(peft_matcher_rank(m, keys[4], &rank, &alpha, NULL), ERR_OK);
    assert_int_equal(rank, 4); /* r of the config */
    peft_matcher_free(m);
    json_decref(c.root);
}

/* config, and a digit per key of keys[]: adapted?  Worked out from PEFT's rules by hand. */
static void targets_exclusions_and_layers_choose_modules(void **state)
{
    (void)state;
    const struct {
        const char *config, *want;
    } cases[] = {
        { "{\"target_modules\": [\"q_proj\", \"v_proj\"]}", "11000" },
        { "{\"target_modules\": [\"_proj\"]}", "00000" },
        { "{\"target_modules\": [\"proj\", \"model.layers.0.self_attn.q_proj\"]}", "10000" },
        { "{\"target_modules\": \"ALL-Linear\"}", "11100" },
        { "{\"target_modules\": \"all-linear\", \"exclude_modules\": [\"v_proj\"]}", "10100" },
        { "{\"target_modules\": \"all-linear\", \"exclude_modules\": \".*mlp.*\"}", "11000" },
        { "{\"target_modules\": \"all-linear\", \"exclude_modules\": \"mlp\"}", "11100" },
        { "{\"target_modules\": \"all-linear\", \"exclude_modules\": \"model.*mlp\"}", "11100" },
        { "{\"target_modules\": [\"lm_head\", \"embed_tokens\"]}", "00011" },
        { "{\"target_modules\": [\"q_proj\", \"v_proj\", \"down_proj\"],"
          "\"layers_to_transform\": 1}",
          "01000" },
        { "{\"target_modules\": [\"q_proj\", \"v_proj\", \"down_proj\"],"
          "\"layers_to_transform\": [10, 0]}",
          "10100" },
        { "{\"target_modules\": [\"q_proj\", \"v_proj\", \"lm_head\"],"
          "\"layers_to_transform\": [0], \"layers_pattern\": \"layers\"}",
          "10001" }, /* see below */
        { "{\"target_modules\": [\"q_proj\", \"v_proj\"],"
          "\"layers_to_transform\": [0], \"layers_pattern\": [\"h\", \"layers\"]}",
          "10000" },
        { "{\"target_modules\": [\"q_proj\", \"v_proj\"],"
          "\"layers_to_transform\": [0], \"layers_pattern\": \"blocks\"}",
          "00000" },
        /* a whole path is adapted whatever the layers are (so was lm_head above) */
        { "{\"target_modules\": [\"model.layers.1.self_attn.v_proj\", \"q_proj\"],"
          "\"layers_to_transform\": [5]}",
          "01000" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct peft_config c;
        struct peft_matcher *m = matcher(&c, cases[i].config);
        if (m == NULL)
            fail_msg("%s is refused", cases[i].config);
        for (size_t k = 0; k < 5; k++) {
            bool hit = false;
            assert_int_equal(peft_matcher_targets(m, keys[k], k < 3, &hit, NULL), ERR_OK);
            if (hit != (cases[i].want[k] == '1'))
                fail_msg("%s on %s", cases[i].config, keys[k]);
        }
        peft_matcher_free(m);
        json_decref(c.root);
    }
}

/* --- tensors ------------------------------------------------------------------------------------
 */

enum { Q0_A, Q0_B, Q1_A, Q1_B };

/* Parse lora_config with one change to its tensors. */
static int parse_changed(const struct support_tensor *change, int at, char msg[512])
{
    struct arch arch;
    support_small_arch(&arch);
    struct support_tensor t[TENSORS];
    size_t n = support_lora_tensors(&arch, "q_proj", 2, false, "F32", t, TENSORS);
    assert_int_equal(n, 4);
    if (change == NULL)
        t[at] = t[--n];
    else
        t[at] = *change;
    if (at == (int)n)
        n++;
    struct adapter_src *a = NULL;
    struct err err = { 0 };
    int rc = support_parse(&arch, lora_config, t, n, &a, &err);
    snprintf(msg, 512, "%s", err.msg);
    adapter_src_free(a);
    return rc;
}

#define Q0 "base_model.model.model.layers.0.self_attn.q_proj"

static void a_tensor_that_does_not_fit_is_refused_by_name(void **state)
{
    (void)state;
    const struct {
        struct support_tensor t;
        int at;
        const char *says;
    } cases[] = {
        { { Q0 ".lora_A.weight", "F32", 3, 8, NULL }, Q0_A, "rank 2" },
        { { Q0 ".lora_A.weight", "F32", 8, 2, NULL }, Q0_A, "[8, 2]" },
        { { Q0 ".lora_A.weight", "F32", 16, -1, NULL }, Q0_A, "[16]" },
        { { Q0 ".lora_B.weight", "F32", 9, 2, NULL }, Q0_B, "[8, 2]" },
        { { Q0 ".lora_A.weight", "I32", 2, 8, NULL }, Q0_A, "type I32" },
        { { Q0 ".lora_A.weight", "BF16", 2, 8, NULL }, Q0_A, "share a type" },
        { { Q0 ".lora_A.weight", "F32", 2, 8, "nan" }, Q0_A, "element 15" },
        { { Q0 ".lora_B.weight", "F32", 8, 2, "inf" }, Q0_B, "not finite" },
        { { Q0 ".lora_A.weight", "F16", 2, 8, "nan" }, Q0_A, "element 15" },
        { { Q0 ".lora_A.weight", "F16", 2, 8, "inf" }, Q0_A, "element 15" },
        { { Q0 ".lora_A.weight", "BF16", 2, 8, "nan" }, Q0_A, "element 15" },
        { { Q0 ".lora_A.weight", "BF16", 2, 8, "inf" }, Q0_A, "element 15" },
        { { Q0 ".lora_A.weights", "F32", 2, 8, NULL }, Q0_A, "does not end" },
        { { Q0 ".lora_A.default.weight", "F32", 2, 8, NULL }, Q0_A, "lora_A.default.weight" },
        { { Q0 ".lora_A", "F32", 2, 8, NULL }, Q0_A, "does not end" },
        { { Q0 ".lora_E", "F32", 2, 1, NULL }, 4, "does not end" },
        { { Q0 ".lora_magnitude_vector", "F32", 8, -1, NULL }, 4, "DoRA" },
        { { Q0 ".lora_B.bias", "F32", 8, -1, NULL }, 4, "biases" },
        { { Q0 ".base_layer.bias", "F32", 8, -1, NULL }, 4, "bias of the base" },
        { { Q0 ".base_layer.weight", "F32", 8, 8, NULL }, 4, "weight of the base" },
        { { "base_model.model.lm_head.weight", "F32", 16, 8, NULL }, 4, "weight of the base" },
        { { "base_model.model.model.embed_tokens.lora_embedding_A", "F32", 2, 16, NULL },
          4,
          "target_modules" },
        { { "base_model.model.lm_head.lora_A.weight", "F32", 2, 8, NULL }, 4, "target_modules" },
        { { "base_model.model.lm_head.lora_embedding_A", "F32", 2, 8, NULL }, 4, "no such linear" },
        { { "base_model.model.model.embed_tokens.lora_A.weight", "F32", 2, 16, NULL },
          4,
          "no such linear" },
        { { "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", "F32", 2, 8, NULL },
          4,
          "no such linear" },
        { { "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "F32", 2, 8, NULL },
          4,
          "no such linear" },
        { { "base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "F32", 2, 8, NULL },
          4,
          "no such linear" },
        { { "model.layers.0.self_attn.q_proj.lora_A.weight", "F32", 2, 8, NULL },
          4,
          "base_model.model." },
        { { "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", "F32", 2, 8, NULL },
          4,
          "target_modules" },
        { { "base_model.model..lora_A.weight", "F32", 2, 8, NULL }, 4, "no such linear" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char msg[512];
        int rc = parse_changed(&cases[i].t, cases[i].at, msg);
        if (rc != ERR_INVALID || strstr(msg, cases[i].says) == NULL ||
            strstr(msg, cases[i].t.name) == NULL)
            fail_msg("%s: %d \"%s\"", cases[i].t.name, rc, msg);
    }
}

static void a_missing_tensor_is_refused_by_name(void **state)
{
    (void)state;
    const char *const want[] = { Q0 ".lora_A.weight is missing", Q0 ".lora_B.weight is missing" };
    for (int i = Q0_A; i <= Q0_B; i++) {
        char msg[512];
        assert_int_equal(parse_changed(NULL, i, msg), ERR_INVALID);
        /* the last tensor took its place, so one of layer 1 stands there twice or is gone */
        if (strstr(msg, want[i]) == NULL)
            fail_msg("%s", msg);
    }
}

static void each_type_of_tensor_is_kept(void **state)
{
    (void)state;
    const char *const types[] = { "F32", "F16", "BF16" };
    const enum dtype want[] = { DT_F32, DT_F16, DT_BF16 };
    struct arch arch;
    support_small_arch(&arch);
    for (int i = 0; i < 3; i++) {
        struct support_tensor t[TENSORS];
        size_t n = support_lora_tensors(&arch, "q_proj", 2, false, types[i], t, TENSORS);
        struct adapter_src *a = NULL;
        struct err err = { 0 };
        assert_int_equal(support_parse(&arch, lora_config, t, n, &a, &err), ERR_OK);
        assert_int_equal(a->modules[0].dtype, want[i]);
        assert_int_equal(a->params, 2 * (2 * 8 + 8 * 2));
        assert_int_equal(a->bytes, a->params * (i == 0 ? 4 : 2));
        adapter_src_free(a);
    }
}

/* --- AdaLoRA
 * -------------------------------------------------------------------------------------- */

static void a_mask_decides_the_rank_and_init_r_the_scaling(void **state)
{
    (void)state;
    const char config[] =
        "{\"peft_type\":\"ADALORA\",\"init_r\":4,\"lora_alpha\":6,\"target_modules\":[\"q_proj\"],"
        "\"total_step\":100,\"tinit\":5,\"tfinal\":7,\"deltaT\":2,\"target_r\":1,\"beta1\":0.7,"
        "\"rank_pattern\":{\"model.layers.0.self_attn.q_proj.lora_E\":[false,true,false,true],"
        "\"model.layers.1.self_attn.q_proj.lora_E\":[false,false,false,false]}}";
    struct arch arch;
    support_small_arch(&arch);
    struct support_tensor t[TENSORS];
    size_t n = support_lora_tensors(&arch, "q_proj", 2, true, "F32", t, TENSORS);
    assert_int_equal(n, 6);
    t[3].rows = 0; /* layer 1 was pruned away */
    t[4].cols = 0;
    t[5].rows = 0;
    struct adapter_src *a = NULL;
    struct err err = { 0 };
    if (support_parse(&arch, config, t, n, &a, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(a->method, METHOD_ADALORA);
    assert_int_equal(a->nmodules, 2);
    const uint8_t mask[] = { 0, 1, 0, 1 };
    const struct adapter_src_module *m = a->modules;
    assert_int_equal(m[0].rank, 2);
    assert_int_equal(m[0].init_rank, 4);
    assert_memory_equal(m[0].mask, mask, 4);
    assert_int_equal(m[1].rank, 0);
    for (int i = 0; i < 2; i++)
        assert_true(m[i].scaling == 6 / (4 + 1e-5));
    assert_int_equal(a->rank_max, 2);
    assert_int_equal(a->rank_min, 0);
    assert_int_equal(a->total_step, 100);
    assert_int_equal(a->tinit, 5);
    assert_int_equal(a->tfinal, 7);
    assert_int_equal(a->deltaT, 2);
    assert_int_equal(a->target_r, 1);
    assert_true(a->beta1 == 0.7 && a->beta2 == 0.85 && a->orth_reg_weight == 0.5);
    adapter_src_free(a);
}

static void bad_masks_are_refused_by_name(void **state)
{
    (void)state;
#define E0 "\"model.layers.0.self_attn.q_proj.lora_E\""
    const char *const bad[] = {
        "{" E0 ": [true]}",
        "{" E0 ": [true, true, true]}",
        "{" E0 ": [true, 1]}",
        "{" E0 ": 2}",
        "{\"model.layers.0.self_attn.q_proj\": [true, true]}",
        "{\"model.layers.0.self_attn.v_proj.lora_E\": [true, true]}",
        "{\"model.layers.7.self_attn.q_proj.lora_E\": [true, true]}",
        "{\"base_model.model.model.layers.0.self_attn.q_proj.lora_E\": [true, true]}",
        "{\"model.layers.0.self_attn.q_proj.lora_E.default\": [true, true]}",
        "{\".lora_E\": [true, true]}",
        "{\"q_proj\": 2}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char msg[512];
        uint8_t hash[32];
        int rc = parse_field(true, "rank_pattern", bad[i], msg, hash);
        if (rc != ERR_INVALID || strstr(msg, "rank_pattern") == NULL)
            fail_msg("%s: %d \"%s\"", bad[i], rc, msg);
    }
}

static void an_alpha_that_peft_reloads_differently_is_refused(void **state)
{
    (void)state;
    char msg[512];
    uint8_t hash[32];
    char config[512];
    const char form[] = "{\"peft_type\":\"ADALORA\",\"init_r\":2,\"lora_alpha\":0,"
                        "\"target_modules\":[\"q_proj\"],\"rank_pattern\":%s}";
    snprintf(config, sizeof config, form, "{" E0 ":[true,true]}");
    assert_int_equal(parse_q(true, config, msg, hash), ERR_INVALID);
    assert_non_null(strstr(msg, "lora_alpha"));
    snprintf(config, sizeof config, form, "null"); /* nothing pruned: init_r stands in for alpha */
    assert_int_equal(parse_q(true, config, msg, hash), ERR_OK);
}

/* --- the document ----------------------------------------------------------------------------- */

static const char docs[] = "docs/adapters.md";
static const char begin_mark[] = "<!-- fields: begin -->\n", end_mark[] = "<!-- fields: end -->\n";

static void the_document_holds_the_table_of_the_code(void **state)
{
    (void)state;
    char *text = NULL;
    size_t len;
    struct err err = { 0 };
    struct buf table;
    buf_init(&table, 1 << 20);
    assert_int_equal(peft_fields_markdown(&table), ERR_OK);
    if (file_read(docs, 1 << 20, &text, &len, &err) != ERR_OK)
        fail_msg("%s (tests run in the project's folder)", err.msg);
    char *from = strstr(text, begin_mark), *to = strstr(text, end_mark);
    assert_true(from != NULL && to != NULL && from < to);
    from += strlen(begin_mark);
    if (getenv("LORAD_WRITE_DOCS") != NULL) {
        FILE *f = fopen(docs, "w");
        assert_non_null(f);
        fprintf(f, "%.*s%s%s", (int)(from - text), text, table.data, to);
        fclose(f);
    } else if ((size_t)(to - from) != table.len || memcmp(from, table.data, table.len) != 0) {
        fail_msg("%s differs from the table in engine/peft_fields.c: "
                 "LORAD_WRITE_DOCS=1 build/tests/test_peft writes it",
                 docs);
    }
    buf_free(&table);
    free(text);
}

/* No description may break the Markdown table. */
static void the_table_has_no_field_twice_and_no_bars(void **state)
{
    (void)state;
    for (const struct peft_field *f = peft_fields; f->name != NULL; f++) {
        assert_null(strchr(f->why, '|'));
        for (const struct peft_field *g = f + 1; g->name != NULL; g++)
            assert_string_not_equal(f->name, g->name);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_refused_field_is_refused_by_name_when_it_is_set),
        cmocka_unit_test(every_refused_field_is_accepted_when_it_says_nothing),
        cmocka_unit_test(every_noted_field_changes_nothing),
        cmocka_unit_test(every_honoured_field_is_used_or_refused_by_name),
        cmocka_unit_test(a_field_of_the_other_method_is_refused),
        cmocka_unit_test(a_field_that_nobody_knows_is_refused_unless_it_says_nothing),
        cmocka_unit_test(a_config_that_is_no_object_is_refused),
        cmocka_unit_test(patterns_match_as_they_do_in_python),
        cmocka_unit_test(patterns_that_might_mean_something_else_are_refused),
        cmocka_unit_test(a_pattern_that_takes_for_ever_is_refused),
        cmocka_unit_test(the_first_pattern_of_the_file_wins),
        cmocka_unit_test(targets_exclusions_and_layers_choose_modules),
        cmocka_unit_test(a_tensor_that_does_not_fit_is_refused_by_name),
        cmocka_unit_test(a_missing_tensor_is_refused_by_name),
        cmocka_unit_test(each_type_of_tensor_is_kept),
        cmocka_unit_test(a_mask_decides_the_rank_and_init_r_the_scaling),
        cmocka_unit_test(bad_masks_are_refused_by_name),
        cmocka_unit_test(an_alpha_that_peft_reloads_differently_is_refused),
        cmocka_unit_test(the_document_holds_the_table_of_the_code),
        cmocka_unit_test(the_table_has_no_field_twice_and_no_bars),
    };
    return cmocka_run_group_tests_name("peft", tests, NULL, NULL);
}
