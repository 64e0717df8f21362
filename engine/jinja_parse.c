/* jinja_parse.c - tokens to tree: statements, and jinja_parse(). */
#include "engine/jinja_int.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- tokens --------------------------------------------------------------------------------------- */

struct jtok *jtok(struct jparser *p) { return &p->toks.v[p->at]; }

bool jtok_op(struct jparser *p, const char *op)
{
    return jtok(p)->type == T_OP && strcmp(jtok(p)->op, op) == 0;
}

bool jtok_name(struct jparser *p, const char *name)
{
    const struct jtok *t = jtok(p);
    return t->type == T_NAME && t->len == strlen(name) && memcmp(t->s, name, t->len) == 0;
}

bool jskip_op(struct jparser *p, const char *op)
{
    const bool is = jtok_op(p, op);
    p->at += is;
    return is;
}

bool jskip_name(struct jparser *p, const char *name)
{
    const bool is = jtok_name(p, name);
    p->at += is;
    return is;
}

void jparse_fail(struct jparser *p, int line, const char *fmt, ...)
{
    char msg[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    p->c->line = line;
    jfail(p->c, "%s", msg);
}

const char *jtok_text(struct jparser *p, const struct jtok *t)
{
    static const char *const names[] = { "the end of the template", "text", "the start of a block",
                                         "the end of the block", "the start of an expression",
                                         "the end of the expression", NULL, "a string",
                                         "an integer", "a number", NULL };
    if (names[t->type] != NULL)
        return names[t->type];
    const int n = t->len < 60 ? (int)t->len : 60;
    char *s = jalloc(p->c, 80, 1);
    if (t->type == T_NAME)
        snprintf(s, 80, "'%.*s'", n, t->s);
    else
        snprintf(s, 80, "'%s'", t->op);
    return s;
}

void jexpect_op(struct jparser *p, const char *op)
{
    if (!jskip_op(p, op))
        jparse_fail(p, jtok(p)->line, "expected '%s', got %s", op, jtok_text(p, jtok(p)));
}

static void expect_name(struct jparser *p, const char *name)
{
    if (!jskip_name(p, name))
        jparse_fail(p, jtok(p)->line, "expected '%s', got %s", name, jtok_text(p, jtok(p)));
}

static void expect(struct jparser *p, enum jtok_type type)
{
    const struct jtok want = { .type = type };
    if (jtok(p)->type != type)
        jparse_fail(p, jtok(p)->line, "expected %s, got %s", jtok_text(p, &want),
                    jtok_text(p, jtok(p)));
    p->at++;
}

/* --- nodes ---------------------------------------------------------------------------------------- */

struct jnode *jnode_new(struct jparser *p, enum jnode_type type, int line)
{
    struct jnode *n = jalloc(p->c, 1, sizeof *n);
    jcharge(p->c, 1);
    n->type = type;
    n->line = line;
    return n;
}

void jnodes_add(struct jctx *c, struct jnodes *l, struct jnode *n)
{
    if (l->n == l->cap) {
        const size_t cap = l->cap ? 2 * l->cap : 4;
        struct jnode **v = jalloc(c, cap, sizeof *v);
        if (l->n > 0)
            memcpy(v, l->v, l->n * sizeof *v);
        l->v = v;
        l->cap = cap;
    }
    l->v[l->n++] = n;
}

const struct jname *jintern(struct jparser *p, const char *s, size_t len)
{
    for (struct jname *n = p->t->names; n != NULL; n = n->next)
        if (n->s->len == len && memcmp(n->s->s, s, len) == 0)
            return n;
    struct jname *n = jalloc(p->c, 1, sizeof *n);
    n->s = jstrn(p->c, s, len).s;
    n->next = p->t->names;
    p->t->names = n;
    return n;
}

/* --- statements ----------------------------------------------------------------------------------- */

static struct jnodes statements(struct jparser *p, const char *const *ends);

/* {% ... %} body {% end %}, for the one end there is. */
static struct jnodes body(struct jparser *p, const char *end)
{
    const char *const ends[] = { end, NULL };
    struct jnodes l;
    jskip_op(p, ":");
    expect(p, T_BLOCK_END);
    l = statements(p, ends);
    p->at++;
    return l;
}

static const struct jname *plain_name(struct jparser *p)
{
    const struct jtok *t = jtok(p);
    if (t->type != T_NAME)
        jparse_fail(p, t->line, "expected a name, got %s", jtok_text(p, t));
    p->at++;
    return jintern(p, t->s, t->len);
}

static void check_target(struct jparser *p, const struct jnode *n)
{
    if (n->type == E_TUPLE || n->type == E_LIST) {
        for (size_t i = 0; i < n->list.n; i++)
            check_target(p, n->list.v[i]);
    } else if (n->type != E_NAME && n->type != E_NSREF) {
        jparse_fail(p, n->line, "cannot assign to this expression");
    }
}

/* What `set` and `for` assign to.  `end` as in jexpr_tuple(). */
static struct jnode *target(struct jparser *p, bool with_namespace, const char *end)
{
    const struct jtok *t = jtok(p);
    struct jnode *n;
    if (with_namespace && t->type == T_NAME && t[1].type == T_OP && strcmp(t[1].op, ".") == 0) {
        n = jnode_new(p, E_NSREF, t->line);
        n->name = plain_name(p);
        jexpect_op(p, ".");
        n->a = jnode_new(p, E_CONST, t->line);
        n->a->value = (struct jv){ .type = J_STR, .s = plain_name(p)->s };
        return n;
    }
    struct jmacro_def *macro = p->macro;
    p->macro = NULL; /* names that are written are not used */
    n = jexpr_tuple(p, true, true, end, false);
    p->macro = macro;
    check_target(p, n);
    return n;
}

static struct jnode *parse_set(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_SET, line);
    n->a = target(p, true, NULL);
    if (jskip_op(p, "=")) {
        n->b = jexpr_tuple(p, false, true, NULL, false);
        return n;
    }
    n->type = N_SETBLOCK;
    n->b = jexpr_filter(p, NULL, false);
    n->list = body(p, "endset");
    return n;
}

static struct jnode *parse_if(struct jparser *p, int line)
{
    static const char *const ends[] = { "elif", "else", "endif", NULL };
    struct jnode *n = jnode_new(p, N_IF, line);
    jenter(p->c); /* elif recurses */
    p->soft++;
    n->a = jexpr_tuple(p, false, false, NULL, false);
    jskip_op(p, ":");
    expect(p, T_BLOCK_END);
    n->list = statements(p, ends);
    if (jtok_name(p, "elif")) {
        p->at++;
        jnodes_add(p->c, &n->other, parse_if(p, jtok(p)->line));
    } else if (jskip_name(p, "else")) {
        n->other = body(p, "endif");
    } else {
        p->at++;
    }
    p->soft--;
    jleave(p->c);
    return n;
}

static struct jnode *parse_for(struct jparser *p, int line)
{
    static const char *const ends[] = { "endfor", "else", NULL };
    struct jnode *n = jnode_new(p, N_FOR, line);
    n->a = target(p, false, "in");
    if (n->a->type == E_NAME && n->a->name == p->t->loop)
        jparse_fail(p, line, "cannot assign to the special variable loop in a for loop");
    expect_name(p, "in");
    n->b = jexpr_tuple(p, false, false, "recursive", false);
    if (jskip_name(p, "if"))
        n->d = jexpr(p, true);
    n->recursive = jskip_name(p, "recursive");
    jskip_op(p, ":");
    expect(p, T_BLOCK_END);
    p->loops++;
    n->list = statements(p, ends);
    p->loops--;
    if (jskip_name(p, "else"))
        n->other = body(p, "endfor");
    else
        p->at++;
    return n;
}

static struct jnode *parse_with(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_WITH, line);
    n->a = jnode_new(p, E_TUPLE, line); /* targets; `d` has the values */
    n->d = jnode_new(p, E_TUPLE, line);
    while (jtok(p)->type != T_BLOCK_END) {
        if (n->a->list.n > 0)
            jexpect_op(p, ",");
        jnodes_add(p->c, &n->a->list, target(p, false, NULL));
        jexpect_op(p, "=");
        jnodes_add(p->c, &n->d->list, jexpr(p, true));
    }
    n->list = body(p, "endwith");
    return n;
}

static void add_param(struct jparser *p, struct jmacro_def *m, int line)
{
    const struct jname **names = jalloc(p->c, m->nparam + 1, sizeof *names);
    if (m->nparam > 0)
        memcpy(names, m->param, m->nparam * sizeof *names);
    names[m->nparam] = plain_name(p);
    for (size_t i = 0; i < m->nparam; i++)
        if (names[i] == names[m->nparam])
            jparse_fail(p, line, "a macro has two parameters of one name");
    m->param = names;
    m->nparam++;
}

static void signature(struct jparser *p, struct jmacro_def *m)
{
    jexpect_op(p, "(");
    while (!jtok_op(p, ")")) {
        if (m->nparam > 0)
            jexpect_op(p, ",");
        const int line = jtok(p)->line;
        add_param(p, m, line);
        if (jskip_op(p, "="))
            jnodes_add(p->c, &m->defaults, jexpr(p, true));
        else if (m->defaults.n > 0)
            jparse_fail(p, line, "non-default argument follows default argument");
    }
    jexpect_op(p, ")");
}

/* The body of a macro or call block: a function of its own, which `break` cannot leave. */
static void macro_body(struct jparser *p, struct jmacro_def *m, const char *end)
{
    struct jmacro_def *outer = p->macro;
    const int loops = p->loops;
    p->macro = m;
    p->loops = 0;
    m->body = body(p, end);
    p->macro = outer;
    p->loops = loops;
    if (outer != NULL) {
        outer->caller |= m->caller;
        outer->varargs |= m->varargs;
        outer->kwargs |= m->kwargs;
    }
    for (size_t i = 0; i < m->nparam; i++) {
        m->caller &= m->param[i] != p->t->caller;
        m->varargs &= m->param[i] != p->t->varargs;
        m->kwargs &= m->param[i] != p->t->kwargs;
    }
}

static struct jnode *parse_macro(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_MACRO, line);
    n->macro = jalloc(p->c, 1, sizeof *n->macro);
    n->macro->name = plain_name(p);
    signature(p, n->macro);
    macro_body(p, n->macro, "endmacro");
    return n;
}

static struct jnode *parse_call(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_CALLBLOCK, line);
    n->macro = jalloc(p->c, 1, sizeof *n->macro);
    if (jtok_op(p, "("))
        signature(p, n->macro);
    n->a = jexpr(p, true);
    if (n->a->type != E_CALL)
        jparse_fail(p, line, "a call block needs a call");
    macro_body(p, n->macro, "endcall");
    return n;
}

static struct jnode *parse_filter(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_FILTERBLOCK, line);
    n->b = jexpr_filter(p, NULL, true);
    n->list = body(p, "endfilter");
    return n;
}

static struct jnode *parse_print(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_PRINT, line);
    while (jtok(p)->type != T_BLOCK_END) {
        if (n->list.n > 0)
            jexpect_op(p, ",");
        jnodes_add(p->c, &n->list, jexpr(p, true));
    }
    return n;
}

static struct jnode *parse_block(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_BLOCK, line);
    const int loops = p->loops;
    p->loops = 0;
    n->name = plain_name(p);
    n->recursive = jskip_name(p, "scoped");
    jskip_name(p, "required");
    n->list = body(p, "endblock");
    if (jtok(p)->type == T_NAME && jintern(p, jtok(p)->s, jtok(p)->len) == n->name)
        p->at++;
    p->loops = loops;
    return n;
}

/* {% generation %}: marks an assistant's words for training; here it is a part like any other. */
static struct jnode *parse_generation(struct jparser *p, int line)
{
    struct jnode *n = jnode_new(p, N_WITH, line);
    n->a = n->d = jnode_new(p, E_TUPLE, line);
    n->list = body(p, "endgeneration");
    return n;
}

static struct jnode *parse_jump(struct jparser *p, int line)
{
    const bool leave = p->toks.v[p->at - 1].s[0] == 'b';
    if (p->loops == 0)
        jparse_fail(p, line, "'%s' outside of a loop", leave ? "break" : "continue");
    return jnode_new(p, leave ? N_BREAK : N_CONTINUE, line);
}

static struct jnode *statement(struct jparser *p, const char *const *ends)
{
    static const struct {
        const char *name;
        struct jnode *(*parse)(struct jparser *p, int line);
    } tags[] = {
        { "for", parse_for }, { "if", parse_if }, { "set", parse_set }, { "macro", parse_macro },
        { "call", parse_call }, { "filter", parse_filter }, { "with", parse_with },
        { "print", parse_print }, { "block", parse_block }, { "break", parse_jump },
        { "continue", parse_jump }, { "generation", parse_generation },
    };
    const struct jtok *t = jtok(p);
    if (t->type != T_NAME)
        jparse_fail(p, t->line, "expected the name of a tag, got %s", jtok_text(p, t));
    for (size_t i = 0; i < sizeof tags / sizeof tags[0]; i++)
        if (jskip_name(p, tags[i].name))
            return tags[i].parse(p, t->line);
    if (ends[0] != NULL)
        jparse_fail(p, t->line, "unknown tag %s where '%s' is looked for", jtok_text(p, t), ends[0]);
    jparse_fail(p, t->line, "unknown tag %s", jtok_text(p, t));
}

static void add_print(struct jparser *p, struct jnodes *l, struct jnode *n)
{
    struct jnode *print = jnode_new(p, N_PRINT, n->line);
    jnodes_add(p->c, &print->list, n);
    jnodes_add(p->c, l, print);
}

/* Until {% and one of `ends`, which is then the current token; or to the end of the template. */
static struct jnodes statements(struct jparser *p, const char *const *ends)
{
    struct jnodes l = { 0 };
    jenter(p->c);
    for (;;) {
        const struct jtok *t = jtok(p);
        if (t->type == T_EOF && ends[0] == NULL)
            break;
        if (t->type == T_EOF)
            jparse_fail(p, t->line, "the template ends where '%s' is looked for", ends[0]);
        p->at++;
        if (t->type == T_DATA) {
            struct jnode *n = jnode_new(p, N_DATA, t->line);
            n->value = jstrn(p->c, t->s, t->len);
            jnodes_add(p->c, &l, n);
        } else if (t->type == T_VAR_BEGIN) {
            add_print(p, &l, jexpr_tuple(p, false, true, NULL, false));
            expect(p, T_VAR_END);
        } else {
            for (size_t i = 0; ends[i] != NULL; i++)
                if (jtok_name(p, ends[i])) {
                    jleave(p->c);
                    return l;
                }
            jnodes_add(p->c, &l, statement(p, ends));
            expect(p, T_BLOCK_END);
        }
    }
    jleave(p->c);
    return l;
}

/* --- public ----------------------------------------------------------------------------------------- */

static bool valid_utf8(const char *text, size_t len)
{
    json_t *j = json_stringn(text, len); /* jansson checks it */
    json_decref(j);
    return j != NULL;
}

static void parse(struct jinja *t, const char *text, size_t len)
{
    struct jctx *c = &t->mem;
    struct jparser p = { .c = c, .t = t };
    static const char *const none[] = { NULL };
    if (!valid_utf8(text, len))
        jfail_plain(c, ERR_INVALID, NULL, "%s is not UTF-8 text", c->name);
    p.toks = jlex(c, text, len);
    t->loop = jintern(&p, "loop", 4);
    t->caller = jintern(&p, "caller", 6);
    t->varargs = jintern(&p, "varargs", 7);
    t->kwargs = jintern(&p, "kwargs", 6);
    t->body = statements(&p, none);
    for (size_t i = 0; i < p.unknown.n; i++) {
        const struct jnode *n = p.unknown.v[i];
        if (!n->soft)
            jparse_fail(&p, n->line, "there is no %s named '%.*s'",
                        n->type == E_FILTER ? "filter" : "test", (int)n->name->s->len,
                        n->name->s->s);
    }
}

int jinja_parse(const char *name, const char *text, size_t len, struct jinja **ret,
                struct err *err)
{
    struct err own = { 0 };
    struct jinja *t = calloc(1, sizeof *t);
    char *copy = strdup(name);
    if (t == NULL || copy == NULL) {
        free(t);
        free(copy);
        return err_nomem(err);
    }
    t->mem = (struct jctx){ .name = copy, .err = err ? err : &own, .max = (size_t)64 << 20,
                            .steps = 20000000, .max_output = (size_t)64 << 20 };
    if (setjmp(t->mem.jump) == 0) {
        parse(t, text, len);
        *ret = t;
        return ERR_OK;
    }
    const int rc = t->mem.rc;
    jinja_free(t);
    return rc;
}

void jinja_free(struct jinja *t)
{
    if (t == NULL)
        return;
    jctx_free(&t->mem);
    free((char *)t->mem.name);
    free(t);
}
