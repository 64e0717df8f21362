/* jinja_test.c - {{ x is test }}. */
#include "engine/jinja_int.h"

#include <string.h>
#include <utf8proc.h>

#define TEST(name, expr)                                                                         \
    static struct jv name(struct jctx *c, struct jv v, const struct jargs *raw, struct jv *a)    \
    {                                                                                            \
        (void)c, (void)raw, (void)a;                                                             \
        return jbool(expr);                                                                      \
    }

static bool remainder_is(struct jctx *c, struct jv v, struct jv by, int64_t want)
{
    return jeq(c, jbinary(c, OP_MOD, v, by), jint(want));
}

/* Is there a letter with case, and have all of them this one? */
static bool all_case(struct jctx *c, struct jv v, bool upper)
{
    const struct jstr *s = jtostr(c, v).s;
    bool any = false;
    jcharge(c, s->len / 16);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        at += jdecode(s->s + at, &cp);
        const utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)cp);
        if (k == (upper ? UTF8PROC_CATEGORY_LL : UTF8PROC_CATEGORY_LU) || k == UTF8PROC_CATEGORY_LT)
            return false;
        any |= k == (upper ? UTF8PROC_CATEGORY_LU : UTF8PROC_CATEGORY_LL);
    }
    return any;
}

static bool same_thing(struct jctx *c, struct jv a, struct jv b)
{
    if (a.type != b.type)
        return false;
    if (a.type == J_NONE || a.type == J_BOOL || a.type == J_INT || a.type == J_UNDEF)
        return jeq(c, a, b);
    return a.type != J_FLOAT && a.m == b.m;
}

static bool is_sequence(struct jv v)
{
    return v.type == J_STR || v.type == J_DICT || v.type == J_UNDEF ||
           (v.type == J_SEQ && v.q->kind <= SEQ_RANGE);
}

static bool is_callable(struct jv v)
{
    return v.type == J_MACRO || v.type == J_FUNC || v.type == J_METHOD || v.type == J_LOOP ||
           v.type == J_UNDEF;
}

static const struct jstr *text_of(struct jctx *c, struct jv v)
{
    return v.type == J_STR ? v.s : jtostr(c, v).s;
}

TEST(is_odd, remainder_is(c, v, jint(2), 1))
TEST(is_even, remainder_is(c, v, jint(2), 0))
TEST(is_divisible, remainder_is(c, v, a[0], 0))
TEST(is_defined, v.type != J_UNDEF)
TEST(is_undefined, v.type == J_UNDEF)
TEST(is_filter, jfilter_find(text_of(c, v)->s, text_of(c, v)->len) != NULL)
TEST(is_test, jtest_find(text_of(c, v)->s, text_of(c, v)->len) != NULL)
TEST(is_none, v.type == J_NONE)
TEST(is_boolean, v.type == J_BOOL)
TEST(is_false, v.type == J_BOOL && !v.b)
TEST(is_true, v.type == J_BOOL && v.b)
TEST(is_integer, v.type == J_INT)
TEST(is_float, v.type == J_FLOAT)
TEST(is_lower, all_case(c, v, false))
TEST(is_upper, all_case(c, v, true))
TEST(is_string, v.type == J_STR)
TEST(is_mapping, v.type == J_DICT)
TEST(is_number, jis_number(v))
TEST(is_seq, is_sequence(v))
TEST(is_iterable, jiterable(v))
TEST(is_call, is_callable(v))
TEST(is_same, same_thing(c, v, a[0]))
TEST(is_escaped, v.type == J_STR && v.s->safe)
TEST(is_in, jcontains(c, a[0], v))
TEST(is_eq, jrelation(c, OP_EQ, v, a[0]))
TEST(is_ne, jrelation(c, OP_NE, v, a[0]))
TEST(is_gt, jrelation(c, OP_GT, v, a[0]))
TEST(is_ge, jrelation(c, OP_GE, v, a[0]))
TEST(is_lt, jrelation(c, OP_LT, v, a[0]))
TEST(is_le, jrelation(c, OP_LE, v, a[0]))

static const struct jrow tests[] = {
    { "odd", is_odd, "", 0 },
    { "even", is_even, "", 0 },
    { "divisibleby", is_divisible, "num", 1 },
    { "defined", is_defined, "", 0 },
    { "undefined", is_undefined, "", 0 },
    { "filter", is_filter, "", 0 },
    { "test", is_test, "", 0 },
    { "none", is_none, "", 0 },
    { "boolean", is_boolean, "", 0 },
    { "false", is_false, "", 0 },
    { "true", is_true, "", 0 },
    { "integer", is_integer, "", 0 },
    { "float", is_float, "", 0 },
    { "lower", is_lower, "", 0 },
    { "upper", is_upper, "", 0 },
    { "string", is_string, "", 0 },
    { "mapping", is_mapping, "", 0 },
    { "number", is_number, "", 0 },
    { "sequence", is_seq, "", 0 },
    { "iterable", is_iterable, "", 0 },
    { "callable", is_call, "", 0 },
    { "sameas", is_same, "other", 1 },
    { "escaped", is_escaped, "", 0 },
    { "in", is_in, "seq", 1 },
    { "==", is_eq, "other", 1 },
    { "eq", is_eq, "other", 1 },
    { "equalto", is_eq, "other", 1 },
    { "!=", is_ne, "other", 1 },
    { "ne", is_ne, "other", 1 },
    { ">", is_gt, "other", 1 },
    { "gt", is_gt, "other", 1 },
    { "greaterthan", is_gt, "other", 1 },
    { ">=", is_ge, "other", 1 },
    { "ge", is_ge, "other", 1 },
    { "<", is_lt, "other", 1 },
    { "lt", is_lt, "other", 1 },
    { "lessthan", is_lt, "other", 1 },
    { "<=", is_le, "other", 1 },
    { "le", is_le, "other", 1 },
};

const struct jrow *jtest_find(const char *name, size_t len)
{
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)
        if (strlen(tests[i].name) == len && memcmp(tests[i].name, name, len) == 0)
            return &tests[i];
    return NULL;
}
