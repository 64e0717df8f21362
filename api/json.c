/* json.c - JSON bodies in, text out.
 *
 * A body is hostile: its size is limited before it gets here, its depth is counted before jansson
 * sees it (jansson recurses), and a key that appears twice is an error, because two readers would
 * take different ones. */
#include "api/api_int.h"

#include <string.h>

/* Nesting outside of strings; jansson checks the rest of the grammar. */
static int depth_of(const char *s, size_t len)
{
    int depth = 0, deepest = 0;
    bool text = false;
    for (size_t i = 0; i < len; i++) {
        if (text) {
            if (s[i] == '\\')
                i++;
            else if (s[i] == '"')
                text = false;
        } else if (s[i] == '"') {
            text = true;
        } else if (s[i] == '[' || s[i] == '{') {
            if (++depth > deepest)
                deepest = depth;
        } else if (s[i] == ']' || s[i] == '}') {
            depth--;
        }
    }
    return deepest;
}

int body_json(const struct api_req *req, bool optional, json_t **ret, struct err *err)
{
    if (req->body == NULL || req->body_len == 0) {
        if (!optional)
            return err_set(err, ERR_INVALID, "a JSON body is required");
        *ret = json_object();
        return *ret ? ERR_OK : err_nomem(err);
    }
    if (depth_of(req->body, req->body_len) > JSON_DEPTH_MAX)
        return err_set(err, ERR_INVALID, "the JSON body is nested more than %d levels deep",
                       JSON_DEPTH_MAX);
    json_error_t why;
    json_t *j = json_loadb(req->body, req->body_len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL,
                           &why);
    if (j == NULL) {
        if (json_error_code(&why) == json_error_out_of_memory)
            return err_nomem(err);
        return err_set(err, ERR_INVALID, "the body is not valid JSON: %s (line %d, column %d)",
                       why.text, why.line, why.column);
    }
    if (!json_is_object(j)) {
        err_set(err, ERR_INVALID, "the JSON body must be an object, not %s", json_kind(j));
        json_decref(j);
        return ERR_INVALID;
    }
    *ret = j;
    return ERR_OK;
}

int json_only(json_t *obj, const char *const *known, struct err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach(obj, key, v)
    {
        size_t i = 0;
        while (known[i] != NULL && strcmp(known[i], key) != 0)
            i++;
        if (known[i] == NULL)
            return err_set(err, ERR_INVALID, "unknown field `%.80s`", key);
    }
    return ERR_OK;
}

int json_get_bool(json_t *obj, const char *name, bool *ret, struct err *err)
{
    const json_t *v = json_object_get(obj, name);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_boolean(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be true or false, not %s",
                            name, json_kind(v));
    *ret = json_is_true(v);
    return ERR_OK;
}

int json_get_int(json_t *obj, const char *name, int64_t lo, int64_t hi, int64_t *ret,
                 struct err *err)
{
    const json_t *v = json_object_get(obj, name);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_integer(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be an integer, not %s", name,
                            json_kind(v));
    const int64_t n = json_integer_value(v);
    if (n < lo || n > hi)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`%s` must be from %lld to %lld, not %lld", name, (long long)lo,
                            (long long)hi, (long long)n);
    *ret = n;
    return ERR_OK;
}

int json_get_str(json_t *obj, const char *name, const char **ret, struct err *err)
{
    const json_t *v = json_object_get(obj, name);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_string(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be a string, not %s", name,
                            json_kind(v));
    if (strlen(json_string_value(v)) != json_string_length(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must not contain NUL", name);
    *ret = json_string_value(v);
    return ERR_OK;
}

/* Length of the valid UTF-8 character at s, or 0. */
static size_t utf8_char(const unsigned char *s, size_t len)
{
    if (s[0] < 0x80)
        return 1;
    const size_t n = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4 || n > len)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
        return 0; /* overlong, surrogate, past U+10FFFF */
    return n;
}

json_t *json_text(const char *s, size_t len)
{
    json_t *j = json_stringn(s, len);
    if (j != NULL)
        return j;
    struct buf b;
    buf_init(&b, 3 * len + 1);
    for (size_t i = 0; i < len;) {
        const size_t n = utf8_char((const unsigned char *)s + i, len - i);
        if (buf_add(&b, n ? s + i : "\xef\xbf\xbd", n ? n : 3) != ERR_OK)
            break;
        i += n ? n : 1;
    }
    j = json_stringn(b.data ? b.data : "", b.len);
    buf_free(&b);
    return j;
}

size_t utf8_count(const char *s, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)s[i] & 0xc0) != 0x80;
    return n;
}
