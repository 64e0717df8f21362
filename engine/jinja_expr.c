/* jinja_expr.c - tokens to tree: expressions, by recursive descent in Jinja's order of precedence:
 * inline if, or, and, not, comparisons, + -, ~, * / // %, **, signs, and then what stands behind
 * a value: .name [key] (call) |filter, is test. */
#include "engine/jinja_int.h"

#include <string.h>

static struct jnode *primary(struct jparser *p);
static struct jnode *unary(struct jparser *p, bool with_filter);

static int line(struct jparser *p) { return jtok(p)->line; }

static struct jnode *two(struct jparser *p, enum jnode_type type, struct jnode *a, struct jnode *b)
{
    struct jnode *n = jnode_new(p, type, a->line);
    n->a = a;
    n->b = b;
    return n;
}

/* --- operators ------------------------------------------------------------------------------------ */

/* A chain of operators of one rank, each as (left op right). */
static struct jnode *chain(struct jparser *p, struct jnode *(*next)(struct jparser *),
                           const char *const *ops, const enum jop *codes)
{
    struct jnode *left = next(p);
    for (;;) {
        size_t i = 0;
        while (ops[i] != NULL && !jtok_op(p, ops[i]))
            i++;
        if (ops[i] == NULL)
            return left;
        jskip_op(p, ops[i]);
        left = two(p, E_BINARY, left, next(p));
        left->op = codes[i];
    }
}

static struct jnode *signed_value(struct jparser *p) { return unary(p, true); }

static struct jnode *power(struct jparser *p)
{
    static const char *const ops[] = { "**", NULL };
    static const enum jop codes[] = { OP_POW };
    return chain(p, signed_value, ops, codes);
}

static struct jnode *product(struct jparser *p)
{
    static const char *const ops[] = { "*", "/", "//", "%", NULL };
    static const enum jop codes[] = { OP_MUL, OP_DIV, OP_FLOORDIV, OP_MOD };
    return chain(p, power, ops, codes);
}

static struct jnode *concat(struct jparser *p)
{
    struct jnode *first = product(p);
    if (!jtok_op(p, "~"))
        return first;
    struct jnode *n = jnode_new(p, E_CONCAT, first->line);
    jnodes_add(p->c, &n->list, first);
    while (jskip_op(p, "~"))
        jnodes_add(p->c, &n->list, product(p));
    return n;
}

static struct jnode *sum(struct jparser *p)
{
    static const char *const ops[] = { "+", "-", NULL };
    static const enum jop codes[] = { OP_ADD, OP_SUB };
    return chain(p, concat, ops, codes);
}

static bool comparison(struct jparser *p, enum jop *ret)
{
    static const struct { const char *op; enum jop code; } ops[] = {
        { "==", OP_EQ }, { "!=", OP_NE }, { "<", OP_LT }, { "<=", OP_LE }, { ">", OP_GT },
        { ">=", OP_GE },
    };
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (jskip_op(p, ops[i].op)) {
            *ret = ops[i].code;
            return true;
        }
    *ret = OP_IN;
    if (jskip_name(p, "in"))
        return true;
    *ret = OP_NOTIN;
    const struct jtok *after = jtok(p)->type == T_EOF ? jtok(p) : jtok(p) + 1;
    if (!jtok_name(p, "not") || after->type != T_NAME || after->len != 2 ||
        memcmp(after->s, "in", 2) != 0)
        return false;
    p->at += 2;
    return true;
}

static struct jnode *compare(struct jparser *p)
{
    struct jnode *first = sum(p);
    enum jop op;
    if (!comparison(p, &op))
        return first;
    struct jnode *n = jnode_new(p, E_COMPARE, first->line);
    n->a = first;
    do {
        enum jop *ops = jalloc(p->c, n->list.n + 1, sizeof *ops);
        if (n->list.n > 0)
            memcpy(ops, n->ops, n->list.n * sizeof *ops);
        ops[n->list.n] = op;
        n->ops = ops;
        jnodes_add(p->c, &n->list, sum(p));
    } while (comparison(p, &op));
    return n;
}

static struct jnode *not_(struct jparser *p)
{
    if (!jtok_name(p, "not"))
        return compare(p);
    jenter(p->c);
    struct jnode *n = jnode_new(p, E_NOT, line(p));
    p->at++;
    n->a = not_(p);
    jleave(p->c);
    return n;
}

static struct jnode *and_(struct jparser *p)
{
    struct jnode *left = not_(p);
    while (jskip_name(p, "and"))
        left = two(p, E_AND, left, not_(p));
    return left;
}

static struct jnode *or_(struct jparser *p)
{
    struct jnode *left = and_(p);
    while (jskip_name(p, "or"))
        left = two(p, E_OR, left, and_(p));
    return left;
}

struct jnode *jexpr(struct jparser *p, bool with_condition)
{
    jenter(p->c);
    const size_t unknown = p->unknown.n;
    struct jnode *n = or_(p);
    while (with_condition && jskip_name(p, "if")) {
        struct jnode *cond = jnode_new(p, E_COND, n->line);
        cond->b = n;
        cond->a = or_(p);
        cond->d = jskip_name(p, "else") ? jexpr(p, true) : NULL;
        n = cond;
    }
    if (n->type == E_COND)
        for (size_t i = unknown; i < p->unknown.n; i++)
            p->unknown.v[i]->soft = true;
    jleave(p->c);
    return n;
}

/* --- literals ------------------------------------------------------------------------------------- */

static bool tuple_ends(struct jparser *p, const char *end)
{
    const enum jtok_type t = jtok(p)->type;
    return t == T_VAR_END || t == T_BLOCK_END || jtok_op(p, ")") || (end && jtok_name(p, end));
}

struct jnode *jexpr_tuple(struct jparser *p, bool simplified, bool with_condition, const char *end,
                          bool parentheses)
{
    struct jnodes items = { 0 };
    bool tuple = false;
    const int at = line(p);
    for (;;) {
        if (items.n > 0)
            jexpect_op(p, ",");
        if (tuple_ends(p, end))
            break;
        jnodes_add(p->c, &items, simplified ? primary(p) : jexpr(p, with_condition));
        if (!jtok_op(p, ","))
            break;
        tuple = true;
    }
    if (!tuple && items.n > 0)
        return items.v[0];
    if (!tuple && !parentheses)
        jparse_fail(p, at, "expected an expression, got %s", jtok_text(p, jtok(p)));
    struct jnode *n = jnode_new(p, E_TUPLE, at);
    n->list = items;
    return n;
}

static struct jnode *list(struct jparser *p)
{
    struct jnode *n = jnode_new(p, E_LIST, line(p));
    jexpect_op(p, "[");
    while (!jtok_op(p, "]")) {
        if (n->list.n > 0)
            jexpect_op(p, ",");
        if (jtok_op(p, "]"))
            break;
        jnodes_add(p->c, &n->list, jexpr(p, true));
    }
    jexpect_op(p, "]");
    return n;
}

static struct jnode *dict(struct jparser *p)
{
    struct jnode *n = jnode_new(p, E_DICT, line(p));
    jexpect_op(p, "{");
    while (!jtok_op(p, "}")) {
        if (n->list.n > 0)
            jexpect_op(p, ",");
        if (jtok_op(p, "}"))
            break;
        jnodes_add(p->c, &n->list, jexpr(p, true));
        jexpect_op(p, ":");
        jnodes_add(p->c, &n->other, jexpr(p, true));
    }
    jexpect_op(p, "}");
    return n;
}

static struct jnode *constant(struct jparser *p, struct jv v)
{
    struct jnode *n = jnode_new(p, E_CONST, line(p));
    n->value = v;
    return n;
}

static struct jnode *name(struct jparser *p)
{
    struct jnode *n;
    if (jtok_name(p, "true") || jtok_name(p, "True")) {
        n = constant(p, jbool(true));
    } else if (jtok_name(p, "false") || jtok_name(p, "False")) {
        n = constant(p, jbool(false));
    } else if (jtok_name(p, "none") || jtok_name(p, "None")) {
        n = constant(p, jnone());
    } else {
        n = jnode_new(p, E_NAME, line(p));
        n->name = jintern(p, jtok(p)->s, jtok(p)->len);
        if (p->macro != NULL) {
            p->macro->caller |= n->name == p->t->caller;
            p->macro->varargs |= n->name == p->t->varargs;
            p->macro->kwargs |= n->name == p->t->kwargs;
        }
    }
    p->at++;
    return n;
}

static struct jnode *text(struct jparser *p)
{
    struct jnode *n = constant(p, jtok(p)->value);
    p->at++;
    while (jtok(p)->type == T_STRING) {
        n->value = jcat(p->c, n->value.s, jtok(p)->value.s);
        p->at++;
    }
    return n;
}

static struct jnode *primary(struct jparser *p)
{
    const struct jtok *t = jtok(p);
    if (t->type == T_NAME)
        return name(p);
    if (t->type == T_STRING)
        return text(p);
    if (t->type == T_INT || t->type == T_FLOAT) {
        struct jnode *n = constant(p, t->value);
        p->at++;
        return n;
    }
    if (jskip_op(p, "(")) {
        struct jnode *n = jexpr_tuple(p, false, true, NULL, true);
        jexpect_op(p, ")");
        return n;
    }
    if (jtok_op(p, "["))
        return list(p);
    if (jtok_op(p, "{"))
        return dict(p);
    jparse_fail(p, t->line, "unexpected %s", jtok_text(p, t));
}

/* --- behind a value ------------------------------------------------------------------------------- */

static struct jnargs *call_args(struct jparser *p)
{
    struct jnargs *a = jalloc(p->c, 1, sizeof *a);
    const int at = line(p);
    bool comma = false, wrong = false;
    jexpect_op(p, "(");
    while (!jtok_op(p, ")")) {
        if (comma) {
            jexpect_op(p, ",");
            if (jtok_op(p, ")"))
                break;
        }
        const struct jtok *t = jtok(p);
        if (jskip_op(p, "*")) {
            wrong |= a->star != NULL || a->stars != NULL;
            a->star = jexpr(p, true);
        } else if (jskip_op(p, "**")) {
            wrong |= a->stars != NULL;
            a->stars = jexpr(p, true);
        } else if (t->type == T_NAME && t[1].type == T_OP && strcmp(t[1].op, "=") == 0) {
            wrong |= a->stars != NULL;
            const struct jname **names = jalloc(p->c, a->kw.n + 1, sizeof *names);
            if (a->kw.n > 0)
                memcpy(names, a->kwname, a->kw.n * sizeof *names);
            names[a->kw.n] = jintern(p, t->s, t->len);
            for (size_t i = 0; i < a->kw.n; i++)
                wrong |= names[i] == names[a->kw.n];
            a->kwname = names;
            p->at += 2;
            jnodes_add(p->c, &a->kw, jexpr(p, true));
        } else {
            wrong |= a->star != NULL || a->stars != NULL || a->kw.n > 0;
            jnodes_add(p->c, &a->pos, jexpr(p, true));
        }
        if (wrong)
            jparse_fail(p, at, "invalid syntax for function call expression");
        comma = true;
    }
    jexpect_op(p, ")");
    return a;
}

/* One of the items between [ and ]. */
static struct jnode *subscript(struct jparser *p)
{
    struct jnode *first = NULL;
    const int at = line(p);
    if (!jtok_op(p, ":")) {
        first = jexpr(p, true);
        if (!jtok_op(p, ":"))
            return first;
    }
    struct jnode *n = jnode_new(p, E_SLICE, at);
    n->a = first;
    jexpect_op(p, ":");
    if (!jtok_op(p, ":") && !jtok_op(p, "]") && !jtok_op(p, ","))
        n->b = jexpr(p, true);
    if (jskip_op(p, ":") && !jtok_op(p, "]") && !jtok_op(p, ","))
        n->d = jexpr(p, true);
    return n;
}

static struct jnode *item(struct jparser *p, struct jnode *on)
{
    struct jnode *n = jnode_new(p, E_ITEM, line(p));
    struct jnodes keys = { 0 };
    n->a = on;
    jexpect_op(p, "[");
    while (!jtok_op(p, "]")) {
        if (keys.n > 0)
            jexpect_op(p, ",");
        jnodes_add(p->c, &keys, subscript(p));
    }
    jexpect_op(p, "]");
    if (keys.n == 1) {
        n->b = keys.v[0];
        return n;
    }
    n->b = jnode_new(p, E_TUPLE, n->line);
    n->b->list = keys;
    for (size_t i = 0; i < keys.n; i++)
        if (keys.v[i]->type == E_SLICE)
            jparse_fail(p, n->line, "a slice cannot be one of several keys");
    return n;
}

static struct jnode *attribute(struct jparser *p, struct jnode *on)
{
    struct jnode *n = jnode_new(p, E_ATTR, line(p));
    n->a = on;
    jexpect_op(p, ".");
    const struct jtok *t = jtok(p);
    if (t->type == T_NAME) {
        n->name = jintern(p, t->s, t->len);
    } else if (t->type == T_INT) {
        n->type = E_ITEM;
        n->b = constant(p, t->value);
    } else {
        jparse_fail(p, t->line, "expected a name or a number after the dot, got %s",
                    jtok_text(p, t));
    }
    p->at++;
    return n;
}

static struct jnode *call(struct jparser *p, struct jnode *on)
{
    struct jnode *n = jnode_new(p, E_CALL, line(p));
    n->a = on;
    n->args = call_args(p);
    return n;
}

static struct jnode *postfix(struct jparser *p, struct jnode *n)
{
    for (;;) {
        if (jtok_op(p, "."))
            n = attribute(p, n);
        else if (jtok_op(p, "["))
            n = item(p, n);
        else if (jtok_op(p, "("))
            n = call(p, n);
        else
            return n;
    }
}

/* The name of a filter or test; may have dots. */
static const char *dotted(struct jparser *p)
{
    struct jout o = { 0 };
    do {
        if (jtok(p)->type != T_NAME)
            jparse_fail(p, line(p), "expected a name, got %s", jtok_text(p, jtok(p)));
        if (o.len > 0)
            jout_puts(p->c, &o, ".");
        jout_add(p->c, &o, jtok(p)->s, jtok(p)->len);
        p->at++;
    } while (jskip_op(p, "."));
    return jstr_z(p->c, jout_end(p->c, &o).s);
}

/* A filter or test that there is not: jinja_parse() refuses it, unless a condition stands before it
 * that may never be true. */
static void check_known(struct jparser *p, struct jnode *n)
{
    n->soft = p->soft > 0;
    if (n->row == NULL)
        jnodes_add(p->c, &p->unknown, n);
}

/* [on]|name(...)|...; with `begun` the first bar is already behind us. */
struct jnode *jexpr_filter(struct jparser *p, struct jnode *on, bool begun)
{
    while (begun || jskip_op(p, "|")) {
        struct jnode *n = jnode_new(p, E_FILTER, line(p));
        const char *what = dotted(p);
        n->a = on;
        n->name = jintern(p, what, strlen(what));
        n->row = jfilter_find(what, strlen(what));
        check_known(p, n);
        n->args = jtok_op(p, "(") ? call_args(p) : jalloc(p->c, 1, sizeof *n->args);
        on = n;
        begun = false;
    }
    return on;
}

/* An argument without parentheses: `x is divisibleby 3`. */
static bool bare_argument(struct jparser *p)
{
    const enum jtok_type t = jtok(p)->type;
    if (t == T_NAME && (jtok_name(p, "else") || jtok_name(p, "or") || jtok_name(p, "and")))
        return false;
    return t == T_NAME || t == T_STRING || t == T_INT || t == T_FLOAT || jtok_op(p, "[") ||
           jtok_op(p, "{");
}

static struct jnode *test(struct jparser *p, struct jnode *on)
{
    struct jnode *n = jnode_new(p, E_TEST, line(p));
    p->at++;
    const bool negated = jskip_name(p, "not");
    const char *what = dotted(p);
    n->a = on;
    n->name = jintern(p, what, strlen(what));
    n->row = jtest_find(what, strlen(what));
    check_known(p, n);
    if (jtok_op(p, "(")) {
        n->args = call_args(p);
    } else {
        n->args = jalloc(p->c, 1, sizeof *n->args);
        if (jtok_name(p, "is"))
            jparse_fail(p, n->line, "you cannot chain multiple tests with is");
        if (bare_argument(p))
            jnodes_add(p->c, &n->args->pos, postfix(p, primary(p)));
    }
    if (!negated)
        return n;
    struct jnode *not = jnode_new(p, E_NOT, n->line);
    not->a = n;
    return not;
}

static struct jnode *unary(struct jparser *p, bool with_filter)
{
    struct jnode *n;
    jenter(p->c);
    if (jtok_op(p, "-") || jtok_op(p, "+")) {
        n = jnode_new(p, jtok_op(p, "-") ? E_NEG : E_POS, line(p));
        p->at++;
        n->a = unary(p, false);
    } else {
        n = primary(p);
    }
    n = postfix(p, n);
    while (with_filter) {
        if (jtok_op(p, "|"))
            n = jexpr_filter(p, n, false);
        else if (jtok_name(p, "is"))
            n = test(p, n);
        else if (jtok_op(p, "("))
            n = call(p, n);
        else
            break;
    }
    jleave(p->c);
    return n;
}
