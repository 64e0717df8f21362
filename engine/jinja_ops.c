/* jinja_ops.c - operators, attributes, subscripts and slices, as Python has them. */
#include "engine/jinja_int.h"

#include <math.h>
#include <string.h>

/* --- arithmetic ---------------------------------------------------------------------------------- */

static const char *const op_names[] = { "+", "-", "*", "/", "//", "%", "** or pow()", "==", "!=",
                                        "<", "<=", ">", ">=", "in", "not in" };

_Noreturn static void unsupported(struct jctx *c, enum jop op, struct jv a, struct jv b)
{
    jfail(c, "unsupported operand type(s) for %s: '%s' and '%s'", op_names[op], jtype_name(a),
          jtype_name(b));
}

_Noreturn static void too_big(struct jctx *c) { jfail(c, "an integer has more than 64 bits"); }

static struct jv int_power(struct jctx *c, int64_t a, int64_t b)
{
    int64_t r = 1;
    if (a == 0 || a == 1)
        return jint(b == 0 ? 1 : a);
    if (a == -1)
        return jint(b & 1 ? -1 : 1);
    for (; b > 0; b--)
        if (__builtin_mul_overflow(r, a, &r))
            too_big(c);
    return jint(r);
}

static struct jv int_op(struct jctx *c, enum jop op, int64_t a, int64_t b)
{
    int64_t r = 0;
    bool over = false;
    if (b == 0 && (op == OP_FLOORDIV || op == OP_MOD))
        jfail(c, "integer division or modulo by zero");
    switch (op) {
    case OP_ADD: over = __builtin_add_overflow(a, b, &r); break;
    case OP_SUB: over = __builtin_sub_overflow(a, b, &r); break;
    case OP_MUL: over = __builtin_mul_overflow(a, b, &r); break;
    case OP_FLOORDIV:
        over = a == INT64_MIN && b == -1;
        r = over ? 0 : a / b - (a % b != 0 && (a < 0) != (b < 0));
        break;
    default: /* OP_MOD */
        r = b == -1 || b == 0 ? 0 : a % b;
        r += r != 0 && (r < 0) != (b < 0) ? b : 0;
        break;
    }
    if (over)
        too_big(c);
    return jint(r);
}

static double float_mod(double a, double b)
{
    double r = fmod(a, b);
    if (r != 0 && (r < 0) != (b < 0))
        r += b;
    return r == 0 ? copysign(0, b) : r;
}

static double float_floordiv(double a, double b)
{
    const double mod = fmod(a, b);
    double div = (a - mod) / b;
    if (mod != 0 && (b < 0) != (mod < 0))
        div -= 1;
    if (div == 0)
        return copysign(0, a / b);
    const double f = floor(div);
    return div - f > 0.5 ? f + 1 : f;
}

static struct jv float_op(struct jctx *c, enum jop op, double a, double b)
{
    if (b == 0 && (op == OP_DIV || op == OP_FLOORDIV || op == OP_MOD))
        jfail(c, "float division by zero");
    switch (op) {
    case OP_ADD: return jfloat(a + b);
    case OP_SUB: return jfloat(a - b);
    case OP_MUL: return jfloat(a * b);
    case OP_DIV: return jfloat(a / b);
    case OP_FLOORDIV: return jfloat(float_floordiv(a, b));
    case OP_MOD: return jfloat(float_mod(a, b));
    default: break;
    }
    if (a == 0 && b < 0)
        jfail(c, "0.0 cannot be raised to a negative power");
    const double r = pow(a, b);
    if (isnan(r) && !isnan(a) && !isnan(b))
        jfail(c, "a negative number has no power of %g here", b);
    if (isinf(r) && !isinf(a) && !isinf(b))
        jfail(c, "the result of a power is too large");
    return jfloat(r);
}

/* --- text and sequences ----------------------------------------------------------------------------- */

static struct jv add_text(struct jctx *c, struct jv a, struct jv b)
{
    if (!a.s->safe && !b.s->safe)
        return jcat(c, a.s, b.s);
    a = jescape(c, a);
    b = jescape(c, b);
    return jstr_safe(c, jcat(c, a.s, b.s), true);
}

static bool repeatable(struct jv v)
{
    return v.type == J_STR || (v.type == J_SEQ && v.q->kind <= SEQ_GROUP);
}

static struct jv repeat(struct jctx *c, struct jv v, int64_t n)
{
    if (v.type == J_STR) {
        struct jout o = { 0 };
        for (; n > 0 && v.s->len > 0; n--) {
            jcharge(c, 1);
            jout_str(c, &o, v.s);
        }
        return jstr_safe(c, jout_end(c, &o), v.s->safe);
    }
    struct jseq *q = jseq_new(c, v.q->kind, 0);
    for (; n > 0 && v.q->n > 0; n--)
        for (size_t i = 0; i < v.q->n; i++)
            jseq_add(c, q, v.q->v[i]);
    return jseqv(q);
}

static struct jv add_seq(struct jctx *c, struct jv a, struct jv b)
{
    struct jseq *q = jseq_new(c, a.q->kind == SEQ_LIST ? SEQ_LIST : SEQ_TUPLE, a.q->n + b.q->n);
    for (size_t i = 0; i < a.q->n; i++)
        jseq_add(c, q, a.q->v[i]);
    for (size_t i = 0; i < b.q->n; i++)
        jseq_add(c, q, b.q->v[i]);
    return jseqv(q);
}

static bool both_lists(struct jv a, struct jv b)
{
    return a.type == J_SEQ && b.type == J_SEQ && a.q->kind <= SEQ_GROUP && b.q->kind <= SEQ_GROUP &&
           (a.q->kind == SEQ_LIST) == (b.q->kind == SEQ_LIST);
}

struct jv jbinary(struct jctx *c, enum jop op, struct jv a, struct jv b)
{
    int64_t x, y;
    if (op == OP_MOD && a.type == J_STR)
        return jprintf(c, a.s, b);
    if (a.type == J_UNDEF)
        jfail_undef(c, a);
    if (b.type == J_UNDEF)
        jfail_undef(c, b);
    if (op == OP_ADD && a.type == J_STR && b.type == J_STR)
        return add_text(c, a, b);
    if (op == OP_ADD && both_lists(a, b))
        return add_seq(c, a, b);
    if (op == OP_MUL && repeatable(a) && jget_int(b, &y))
        return repeat(c, a, y);
    if (op == OP_MUL && repeatable(b) && jget_int(a, &x))
        return repeat(c, b, x);
    if (op == OP_ADD && a.type == J_STR)
        jfail(c, "can only concatenate str (not \"%s\") to str", jtype_name(b));
    if (!jis_number(a) || !jis_number(b))
        unsupported(c, op, a, b);
    if (jget_int(a, &x) && jget_int(b, &y)) {
        if (op == OP_POW && y >= 0)
            return int_power(c, x, y);
        if (op != OP_DIV && op != OP_POW)
            return int_op(c, op, x, y);
    }
    return float_op(c, op, jnumber(a), jnumber(b));
}

struct jv jnegate(struct jctx *c, struct jv v, bool minus)
{
    int64_t i;
    if (v.type == J_UNDEF)
        jfail_undef(c, v);
    if (v.type == J_FLOAT)
        return jfloat(minus ? -v.d : v.d);
    if (!jget_int(v, &i))
        jfail(c, "bad operand type for unary %s: '%s'", minus ? "-" : "+", jtype_name(v));
    if (minus && i == INT64_MIN)
        too_big(c);
    return jint(minus ? -i : i);
}

/* --- relations ------------------------------------------------------------------------------------ */

bool jcontains(struct jctx *c, struct jv in, struct jv what)
{
    if (in.type == J_STR) {
        if (what.type != J_STR)
            jfail(c, "'in <string>' requires string as left operand, not %s", jtype_name(what));
        return jfind(c, in.s, what.s, 0) != SIZE_MAX;
    }
    if (in.type == J_DICT)
        return jgiven(jdict_get(c, in.m, what));
    if (in.type == J_UNDEF)
        return false;
    if (in.type != J_SEQ)
        jfail(c, "argument of type '%s' is not iterable", jtype_name(in));
    for (size_t i = 0; i < in.q->n; i++)
        if (jeq(c, in.q->v[i], what)) {
            if (in.q->kind == SEQ_GEN) { /* used up to here */
                in.q->n -= i + 1;
                in.q->v += i + 1;
                in.q->cap = in.q->n;
            }
            return true;
        }
    if (in.q->kind == SEQ_GEN)
        in.q->n = 0;
    return false;
}

static bool is_nan(struct jv v) { return v.type == J_FLOAT && isnan(v.d); }

bool jrelation(struct jctx *c, enum jop op, struct jv a, struct jv b)
{
    switch (op) {
    case OP_EQ: return jeq(c, a, b);
    case OP_NE: return !jeq(c, a, b);
    case OP_IN: return jcontains(c, b, a);
    case OP_NOTIN: return !jcontains(c, b, a);
    default: break;
    }
    const int d = jcompare(c, a, b, op_names[op]);
    if (is_nan(a) || is_nan(b))
        return false;
    return op == OP_LT ? d < 0 : op == OP_LE ? d <= 0 : op == OP_GT ? d > 0 : d >= 0;
}

/* --- parts of things ------------------------------------------------------------------------------- */

/* What Python finds as an attribute; J_MISSING if there is none. */
static struct jv own_attr(struct jctx *c, struct jv obj, const struct jstr *name)
{
    const struct jv none = { .type = J_MISSING };
    if (obj.type == J_LOOP)
        return jloop_attr(c, obj.loop, name);
    if (obj.type == J_SPACE)
        return jdict_get(c, obj.m, (struct jv){ .type = J_STR, .s = name });
    if (obj.type == J_MACRO && jstr_is(name, "name"))
        return obj.macro->def->name ? (struct jv){ .type = J_STR, .s = obj.macro->def->name->s }
                                    : jnone();
    if (obj.type == J_SEQ && obj.q->kind == SEQ_GROUP && jstr_is(name, "grouper"))
        return obj.q->v[0];
    if (obj.type == J_SEQ && obj.q->kind == SEQ_GROUP && jstr_is(name, "list"))
        return obj.q->v[1];
    if (jmethod_unsafe(obj, name))
        return jundef_hint(c, "access to attribute '%.*s' of '%s' object is unsafe", (int)name->len,
                           name->s, jtype_name(obj));
    const struct jrow *row = jmethod_find(obj, name);
    if (row == NULL)
        return none;
    struct jmethod *m = jalloc(c, 1, sizeof *m);
    m->self = obj;
    m->row = row;
    return (struct jv){ .type = J_METHOD, .method = m };
}

static int64_t index_of(struct jctx *c, struct jv key, int64_t n)
{
    int64_t i;
    if (!jget_int(key, &i))
        return -1;
    jcharge(c, 1);
    return i < 0 ? i + n : i;
}

static bool countable(struct jv v)
{
    return v.type == J_SEQ && v.q->kind <= SEQ_RANGE;
}

/* obj[key] as Python has it; J_MISSING where Python raises LookupError or TypeError. */
static struct jv own_item(struct jctx *c, struct jv obj, struct jv key)
{
    const struct jv none = { .type = J_MISSING };
    if (obj.type == J_DICT) {
        if (key.type == J_DICT || (key.type == J_SEQ && key.q->kind == SEQ_LIST))
            return none;
        return jdict_get(c, obj.m, key);
    }
    if (countable(obj)) {
        const int64_t i = index_of(c, key, (int64_t)obj.q->n);
        return i >= 0 && i < (int64_t)obj.q->n ? obj.q->v[i] : none;
    }
    if (obj.type == J_STR) {
        const int64_t i = index_of(c, key, (int64_t)obj.s->chars);
        if (i < 0 || i >= (int64_t)obj.s->chars)
            return none;
        const size_t from = jchar_at(obj.s, (size_t)i), to = jchar_at(obj.s, (size_t)i + 1);
        jcharge(c, from / 64);
        return jstr_safe(c, jstr_part(c, obj.s, from, to), obj.s->safe);
    }
    return none;
}

struct jv jattr(struct jctx *c, struct jv obj, struct jv name)
{
    if (obj.type == J_UNDEF)
        jfail_undef(c, obj);
    struct jv v = own_attr(c, obj, name.s);
    if (!jgiven(v))
        v = own_item(c, obj, name);
    return jgiven(v) ? v : jundef(c, obj, name);
}

struct jv jitem(struct jctx *c, struct jv obj, struct jv key)
{
    if (obj.type == J_UNDEF)
        jfail_undef(c, obj);
    struct jv v = own_item(c, obj, key);
    if (!jgiven(v) && key.type == J_STR)
        v = own_attr(c, obj, key.s);
    return jgiven(v) ? v : jundef(c, obj, key);
}

/* --- slices --------------------------------------------------------------------------------------- */

static int64_t bound(struct jctx *c, struct jv v, int64_t n, int64_t step, int64_t missing)
{
    int64_t i;
    if (v.type == J_NONE)
        return missing;
    if (v.type == J_UNDEF || !jget_int(v, &i))
        jfail(c, "slice indices must be integers or None or have an __index__ method");
    if (i < 0)
        i = i < -n ? -1 : i + n;
    const int64_t lo = step < 0 ? -1 : 0, hi = step < 0 ? n - 1 : n;
    return i < lo ? lo : i > hi ? hi : i;
}

struct jv jslice(struct jctx *c, struct jv obj, struct jv from, struct jv to, struct jv step)
{
    int64_t by = 1;
    if (obj.type == J_UNDEF)
        jfail_undef(c, obj);
    if (obj.type != J_STR && !countable(obj)) {
        if (obj.type == J_DICT)
            jfail(c, "unhashable type: 'slice'");
        jfail(c, "'%s' object is not subscriptable", jtype_name(obj));
    }
    if (step.type != J_NONE && !jget_int(step, &by))
        jfail(c, "slice indices must be integers or None or have an __index__ method");
    if (by == 0)
        jfail(c, "slice step cannot be zero");
    by = by > INT32_MAX ? INT32_MAX : by < -INT32_MAX ? -INT32_MAX : by; /* longer than anything */
    const int64_t n = (int64_t)jlen(c, obj);
    int64_t at = bound(c, from, n, by, by < 0 ? n - 1 : 0);
    const int64_t end = bound(c, to, n, by, by < 0 ? -1 : n);
    if (obj.type == J_STR && by == 1) {
        const size_t b = jchar_at(obj.s, (size_t)at);
        const size_t e = at < end ? jchar_at(obj.s, (size_t)end) : b;
        jcharge(c, e / 64);
        return jstr_safe(c, jstr_part(c, obj.s, b, e), obj.s->safe);
    }
    const struct jspan all = obj.type == J_STR ? jiter(c, obj)
                                               : (struct jspan){ obj.q->v, obj.q->n };
    struct jseq *q = jseq_new(c, obj.type == J_STR || obj.q->kind == SEQ_GROUP ? SEQ_TUPLE
                                                                               : obj.q->kind, 0);
    struct jout o = { 0 };
    const int64_t first = at;
    /* `by` may be huge: stop before the sum overflows */
    while (by > 0 ? at < end : at > end) {
        if (obj.type == J_STR)
            jout_str(c, &o, all.v[at].s);
        else
            jseq_add(c, q, all.v[at]);
        if (by > 0 ? by >= end - at : by <= end - at)
            break;
        at += by;
    }
    if (obj.type == J_STR)
        return jstr_safe(c, jout_end(c, &o), obj.s->safe);
    if (q->kind == SEQ_RANGE) { /* for printing; the items lie within a range, so nothing overflows */
        q->start = obj.q->start + first * obj.q->step;
        q->stop = obj.q->start + end * obj.q->step;
        q->step = obj.q->step * by;
    }
    return jseqv(q);
}
