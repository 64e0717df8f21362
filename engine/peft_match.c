/* peft_match.c - which modules an adapter's config means, and with which rank and alpha.
 *
 * PEFT's configs hold Python regular expressions.  They are run by PCRE2, which is a different
 * language at the edges: so a pattern is first read by re_scan(), which lets through only what
 * means the same in both, and names what it stops at.  The strings are put together exactly as
 * PEFT does ("(.*\.)?(" P ")$" and so on) before they are scanned and compiled, because a pattern
 * may reach out of the brackets around it.  Patterns come from strangers: matching has a limit of
 * steps per match, and of processor time in all. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/peft_int.h"

#include <errno.h>
#include <limits.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { PATTERN_MAX = 4096, STEPS_MAX = 20000, PATTERNS_MAX = 16384 };
#define SECONDS_MAX 5.0

enum target_kind { TARGET_LIST, TARGET_REGEX, TARGET_ALL_LINEAR };

struct pattern {
    pcre2_code *code;
    double value; /* in rank_pattern and alpha_pattern */
};

struct patterns {
    size_t n;
    struct pattern *item;
};

struct peft_matcher {
    const struct peft_config *config;
    enum target_kind kind;
    json_t *targets, *exclude; /* lists, borrowed from the config; exclude may be NULL */
    struct patterns target_re, exclude_re, layers_re, rank_re, alpha_re;
    json_t *layers; /* layers_to_transform: number, list, or NULL */
    pcre2_match_data *data;
    pcre2_match_context *context;
    double started;
    unsigned matches;
};

/* --- the common part of Python's and PCRE2's regular expressions ---------------------------- */

/* The closing bracket of the set that starts at p ("[..."), or NULL with a reason. */
static const char *scan_set(const char *p, const char **why)
{
    p++;
    if (*p == '^')
        p++;
    if (*p == ']') /* first of all it stands for itself */
        p++;
    for (; *p != ']'; p++) {
        if (*p == '\0') {
            *why = "a set without its closing bracket";
            return NULL;
        }
        if (*p == '[' && strchr(":.=", p[1]) != NULL && p[1] != '\0') {
            *why = "a POSIX class";
            return NULL;
        }
        if (*p == '\\') {
            p++;
            bool letter =
                (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9');
            if (*p == '\0' || (letter && strchr("dDwWsS", *p) == NULL)) {
                *why = "an escape that this server does not use in sets";
                return NULL;
            }
        }
    }
    return p;
}

/* The end of an escape outside of a set: "\d" and the like, "\." and the like, "\1" to "\9". */
static const char *scan_escape(const char *p, const char **why)
{
    char c = p[1];
    bool digit = c >= '0' && c <= '9';
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    bool ok = c != '\0' && (!letter || strchr("dDwWsSbBAZ", c) != NULL);
    if (digit)
        ok = c != '0' && !(p[2] >= '0' && p[2] <= '9');
    if (!ok)
        *why = "an escape that Python and this server may read differently";
    return ok ? p + 1 : NULL;
}

/* "{2}", "{2,}" and "{2,5}" mean the same everywhere; other braces do not. */
static const char *scan_count(const char *p, const char **why)
{
    const char *q = p + 1;
    size_t digits = strspn(q, "0123456789");
    q += digits;
    if (*q == ',')
        q += 1 + strspn(q + 1, "0123456789");
    if (digits == 0 || *q != '}') {
        *why = "a brace that is not a count such as {2,5}";
        return NULL;
    }
    return q;
}

/* "(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?P<name>", "(?P=name)". */
static const char *scan_open(const char *p, const char **why)
{
    static const char *const known[] = { "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?P<", "(?P=" };
    if (p[1] == '*') {
        *why = "a bracket followed by an asterisk";
        return NULL;
    }
    if (p[1] != '?')
        return p;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strncmp(p, known[i], strlen(known[i])) == 0)
            return p + strlen(known[i]) - 1;
    *why = "a group of a kind that this server does not use";
    return NULL;
}

/* NULL if the pattern means the same in Python and PCRE2 (or is an error in both), else what it
 * stops at. */
static const char *re_scan(const char *p)
{
    const char *why = NULL;
    for (; p != NULL && *p != '\0'; p += p != NULL) {
        if (*p == '[')
            p = scan_set(p, &why);
        else if (*p == '\\')
            p = scan_escape(p, &why);
        else if (*p == '{')
            p = scan_count(p, &why);
        else if (*p == '(')
            p = scan_open(p, &why);
        if (p == NULL)
            break;
    }
    return why;
}

static int bad_pattern(const char *field, const char *pattern, const char *why, struct err *err)
{
    char shown[128];
    return peft_refuse(err, "adapter_config.json: %s: the regular expression \"%s\" %s", field,
                       peft_show(pattern, shown), why);
}

/* Compile before + pattern + after. */
static int re_compile(const char *field, const char *before, const char *pattern, const char *after,
                      pcre2_code **ret, struct err *err)
{
    char text[PATTERN_MAX + 32], why[256];
    size_t len = strlen(pattern);
    if (len > PATTERN_MAX)
        return bad_pattern(field, pattern, "is longer than 4096 bytes", err);
    snprintf(text, sizeof text, "%s%s%s", before, pattern, after);
    const char *stop = re_scan(text);
    if (stop != NULL) {
        snprintf(why, sizeof why, "has %s", stop);
        return bad_pattern(field, pattern, why, err);
    }
    int code;
    PCRE2_SIZE at;
    *ret = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                         PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
    if (*ret != NULL)
        return ERR_OK;
    PCRE2_UCHAR said[160];
    pcre2_get_error_message(code, said, sizeof said);
    snprintf(why, sizeof why, "is not valid: %s", (const char *)said);
    return bad_pattern(field, pattern, why, err);
}

/* One anchored match; `options` adds PCRE2_ENDANCHORED for a match of the whole path. */
static int re_match(struct peft_matcher *m, const pcre2_code *re, const char *field,
                    const char *path, uint32_t options, bool *ret, struct err *err)
{
    if ((m->matches++ & 255) == 0) {
        struct timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        double now = (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
        if (m->matches == 1)
            m->started = now;
        if (now - m->started > SECONDS_MAX)
            return peft_refuse(err,
                               "adapter_config.json: its regular expressions took more than "
                               "5 seconds, last in %s",
                               field);
    }
    int rc = pcre2_match(re, (PCRE2_SPTR)path, strlen(path), 0,
                         options | PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, m->data, m->context);
    if (rc == PCRE2_ERROR_NOMATCH || rc >= 0) {
        *ret = rc >= 0;
        return ERR_OK;
    }
    if (rc == PCRE2_ERROR_NOMEMORY)
        return err_nomem(err);
    return peft_refuse(err, "adapter_config.json: a regular expression of %s takes too many steps",
                       field);
}

/* --- making one ------------------------------------------------------------------------------ */

static int patterns_room(struct patterns *p, size_t n, const char *field, struct err *err)
{
    if (n > PATTERNS_MAX) {
        peft_refuse(err, "adapter_config.json: %s has %zu entries, at most %d are read", field, n,
                    PATTERNS_MAX);
        return ERR_INVALID;
    }
    p->item = calloc(n + 1, sizeof *p->item);
    if (p->item != NULL)
        return ERR_OK;
    err_nomem(err);
    return ERR_NOMEM;
}

static void patterns_free(struct patterns *p)
{
    for (size_t i = 0; i < p->n; i++)
        pcre2_code_free(p->item[i].code);
    free(p->item);
}

/* There is room: patterns_room() made it. */
static int patterns_add(struct patterns *p, const char *field, const char *before,
                        const char *pattern, const char *after, double value, struct err *err)
{
    struct pattern it = { .value = value };
    int rc = re_compile(field, before, pattern, after, &it.code, err);
    if (rc == ERR_OK)
        p->item[p->n++] = it;
    return rc;
}

/* {"regex": number, ...} in the order of the file. */
static int read_dict(struct patterns *p, json_t *dict, const char *field, bool ranks,
                     struct err *err)
{
    const char *key;
    json_t *v;
    int rc = patterns_room(p, dict != NULL ? json_object_size(dict) : 0, field, err);
    if (rc != ERR_OK || dict == NULL)
        return rc;
    json_object_foreach(dict, key, v)
    {
        char shown[2][128];
        bool ok = ranks ? json_is_integer(v) && json_integer_value(v) >= 1 &&
                              json_integer_value(v) <= ADAPTER_MAX_RANK
                        : json_is_number(v);
        if (!ok)
            return peft_refuse(err, "adapter_config.json: %s: \"%s\" is %s, which is not %s", field,
                               peft_show(key, shown[0]), peft_show_json(v, shown[1]),
                               ranks ? "a rank from 1 to 4096" : "a number");
        rc = patterns_add(p, field, "(.*\\.)?(", key, ")$", json_number_value(v), err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

static int wrong_type(const char *field, const char *want, const json_t *v, struct err *err)
{
    char shown[128];
    return peft_refuse(err, "adapter_config.json: %s must be %s, not %s", field, want,
                       peft_show_json(v, shown));
}

static bool is_list_of_strings(const json_t *v)
{
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!json_is_string(json_array_get(v, i)))
            return false;
    return json_is_array(v);
}

static int read_targets(struct peft_matcher *m, struct err *err)
{
    static const char field[] = "target_modules";
    json_t *v = json_object_get(m->config->root, field);
    if (v == NULL || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0))
        return peft_refuse(err, "adapter_config.json: target_modules is missing: it must say which "
                                "layers are adapted");
    if (is_list_of_strings(v)) {
        m->kind = TARGET_LIST;
        m->targets = v;
        return ERR_OK;
    }
    if (!json_is_string(v))
        return wrong_type(field, "a list of names or a string", v, err);
    if (strcasecmp(json_string_value(v), "all-linear") == 0) {
        m->kind = TARGET_ALL_LINEAR;
        return ERR_OK;
    }
    m->kind = TARGET_REGEX;
    int rc = patterns_room(&m->target_re, 1, field, err);
    return rc != ERR_OK ? rc
                        : patterns_add(&m->target_re, field, "", json_string_value(v), "", 0, err);
}

static int read_exclude(struct peft_matcher *m, struct err *err)
{
    static const char field[] = "exclude_modules";
    json_t *v = json_object_get(m->config->root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (is_list_of_strings(v)) {
        m->exclude = v;
        return ERR_OK;
    }
    if (!json_is_string(v))
        return wrong_type(field, "a list of names or a regular expression", v, err);
    if (json_string_length(v) == 0)
        return ERR_OK;
    int rc = patterns_room(&m->exclude_re, 1, field, err);
    return rc != ERR_OK ? rc
                        : patterns_add(&m->exclude_re, field, "", json_string_value(v), "", 0, err);
}

/* layers_pattern: a string or a list of them, each a regular expression for the segment that
 * stands before the layer's number.  None: any segment. */
static int read_layers_pattern(struct peft_matcher *m, json_t *v, struct err *err)
{
    static const char field[] = "layers_pattern";
    bool none = v == NULL || json_is_null(v) || (json_is_string(v) && json_string_length(v) == 0) ||
                (json_is_array(v) && json_array_size(v) == 0);
    if (!none && !json_is_string(v) && !is_list_of_strings(v))
        return wrong_type(field, "a string or a list of strings", v, err);
    size_t n = json_is_array(v) && !none ? json_array_size(v) : 1;
    int rc = patterns_room(&m->layers_re, n, field, err);
    for (size_t i = 0; rc == ERR_OK && i < n; i++) {
        const char *segment = none                ? "[^.]*"
                              : json_is_string(v) ? json_string_value(v)
                                                  : json_string_value(json_array_get(v, i));
        rc = patterns_add(&m->layers_re, field, ".*?\\.", segment, "\\.(\\d+)\\.", 0, err);
    }
    return rc;
}

static int read_layers(struct peft_matcher *m, struct err *err)
{
    static const char field[] = "layers_to_transform";
    json_t *v = json_object_get(m->config->root, field);
    json_t *pattern = json_object_get(m->config->root, "layers_pattern");
    bool none = v == NULL || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0);
    if (none) {
        bool has_pattern = json_string_length(pattern) > 0 || json_array_size(pattern) > 0;
        return !has_pattern
                   ? ERR_OK
                   : wrong_type("layers_pattern", "null without layers_to_transform", pattern, err);
    }
    bool ok = json_is_integer(v) || json_is_array(v);
    for (size_t i = 0; ok && i < json_array_size(v); i++)
        ok = json_is_integer(json_array_get(v, i));
    if (!ok)
        return wrong_type(field, "a number or a list of numbers", v, err);
    if (m->kind != TARGET_LIST)
        return wrong_type(field, "null when target_modules is a string (as PEFT says)", v, err);
    m->layers = v;
    return read_layers_pattern(m, pattern, err);
}

int peft_matcher_create(const struct peft_config *c, struct peft_matcher **ret, struct err *err)
{
    struct peft_matcher *m = calloc(1, sizeof *m);
    if (m == NULL)
        return err_nomem(err);
    m->config = c;
    int rc = ERR_OK;
    m->data = pcre2_match_data_create(64, NULL);
    m->context = pcre2_match_context_create(NULL);
    if (m->data == NULL || m->context == NULL)
        rc = err_nomem(err);
    else
        pcre2_set_match_limit(m->context, STEPS_MAX);
    if (rc == ERR_OK)
        rc = read_targets(m, err);
    if (rc == ERR_OK)
        rc = read_exclude(m, err);
    if (rc == ERR_OK)
        rc = read_layers(m, err);
    if (rc == ERR_OK && !c->adalora)
        rc = read_dict(&m->rank_re, c->rank_pattern, "rank_pattern", true, err);
    if (rc == ERR_OK && !c->adalora)
        rc = read_dict(&m->alpha_re, c->alpha_pattern, "alpha_pattern", false, err);
    if (rc != ERR_OK) {
        peft_matcher_free(m);
        return rc;
    }
    *ret = m;
    return ERR_OK;
}

void peft_matcher_free(struct peft_matcher *m)
{
    if (m == NULL)
        return;
    patterns_free(&m->target_re);
    patterns_free(&m->exclude_re);
    patterns_free(&m->layers_re);
    patterns_free(&m->rank_re);
    patterns_free(&m->alpha_re);
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    free(m);
}

/* --- asking one ------------------------------------------------------------------------------ */

/* `path` is the entry or ends with "." and the entry; *exact says that it is the entry. */
static bool in_list(const json_t *list, const char *path, bool *exact)
{
    size_t n = strlen(path);
    bool found = false;
    *exact = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *end = json_string_value(v);
        size_t k = json_string_length(v);
        if (k > n || k == 0 || memcmp(path + n - k, end, k) != 0)
            continue;
        if (k == n)
            return *exact = true;
        found = found || path[n - k - 1] == '.';
    }
    return found;
}

/* Is the layer that the path names among layers_to_transform? */
static int in_layers(struct peft_matcher *m, const char *path, bool *ret, struct err *err)
{
    bool found = false;
    *ret = false;
    for (size_t i = 0; i < m->layers_re.n && !found; i++) {
        int rc = re_match(m, m->layers_re.item[i].code, "layers_pattern", path, 0, &found, err);
        if (rc != ERR_OK)
            return rc;
    }
    if (!found)
        return ERR_OK;
    const PCRE2_SIZE *span = pcre2_get_ovector_pointer(m->data);
    char digits[24] = "", *end = digits;
    if (span[2] != PCRE2_UNSET && span[3] > span[2] && span[3] - span[2] < sizeof digits)
        memcpy(digits, path + span[2], span[3] - span[2]);
    errno = 0;
    long long layer = strtoll(digits, &end, 10);
    if (digits[0] < '0' || digits[0] > '9' || *end != '\0' || errno != 0)
        return peft_refuse(
            err, "adapter_config.json: layers_pattern finds no layer number in \"%s\"", path);
    if (json_is_integer(m->layers))
        *ret = json_integer_value(m->layers) == layer;
    for (size_t i = 0; i < json_array_size(m->layers) && !*ret; i++)
        *ret = json_integer_value(json_array_get(m->layers, i)) == layer;
    return ERR_OK;
}

static int is_excluded(struct peft_matcher *m, const char *path, bool *ret, struct err *err)
{
    bool exact;
    *ret = m->exclude != NULL && in_list(m->exclude, path, &exact);
    if (m->exclude_re.n == 0)
        return ERR_OK;
    return re_match(m, m->exclude_re.item[0].code, "exclude_modules", path, PCRE2_ENDANCHORED, ret,
                    err);
}

int peft_matcher_targets(struct peft_matcher *m, const char *path, bool linear, bool *ret,
                         struct err *err)
{
    bool excluded, exact;
    *ret = false;
    int rc = is_excluded(m, path, &excluded, err);
    if (rc != ERR_OK || excluded)
        return rc;
    switch (m->kind) {
    case TARGET_ALL_LINEAR:
        *ret = linear;
        return ERR_OK;
    case TARGET_REGEX:
        return re_match(m, m->target_re.item[0].code, "target_modules", path, PCRE2_ENDANCHORED,
                        ret, err);
    case TARGET_LIST:
        break;
    }
    *ret = in_list(m->targets, path, &exact);
    if (*ret && !exact && m->layers != NULL) /* a full path needs no layer, in PEFT too */
        return in_layers(m, path, ret, err);
    return ERR_OK;
}

/* The value of the first key that matches, or what it was. */
static int first_match(struct peft_matcher *m, const struct patterns *p, const char *field,
                       const char *path, double *ret, struct err *err)
{
    for (size_t i = 0; i < p->n; i++) {
        bool found = false;
        int rc = re_match(m, p->item[i].code, field, path, 0, &found, err);
        if (rc != ERR_OK)
            return rc;
        if (found) {
            *ret = p->item[i].value;
            return ERR_OK;
        }
    }
    return ERR_OK;
}

int peft_matcher_rank(struct peft_matcher *m, const char *path, int *ret_rank, double *ret_alpha,
                      struct err *err)
{
    double rank = m->config->r, alpha = m->config->alpha;
    int rc = first_match(m, &m->rank_re, "rank_pattern", path, &rank, err);
    if (rc == ERR_OK)
        rc = first_match(m, &m->alpha_re, "alpha_pattern", path, &alpha, err);
    *ret_rank = (int)rank;
    *ret_alpha = alpha;
    return rc;
}
