/* jinja_exec.c - statements: what they print and what they set; jinja_render().
 *
 * Scopes: a loop's body (each time), a macro, a call block, the bodies of set, filter and with have
 * one of their own; `if` has none.  A name is looked up from the innermost scope outwards, then among
 * the template's variables, then among the global functions; `set` writes to the innermost. */
#include "engine/jinja_int.h"

#include <stdlib.h>
#include <string.h>

enum flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE };

static enum flow run(struct jctx *c, struct jscope *s, const struct jnodes *l);

static struct jscope *inner(struct jctx *c, struct jscope *parent)
{
    struct jscope *s = jalloc(c, 1, sizeof *s);
    s->parent = parent;
    return s;
}

/* Runs with the output going to `o`. */
static enum flow capture(struct jctx *c, struct jscope *s, const struct jnodes *l, struct jout *o)
{
    struct jout *before = c->out;
    c->out = o;
    const enum flow f = run(c, s, l);
    c->out = before;
    return f;
}

/* --- assignment ------------------------------------------------------------------------------------ */

static void set_attr(struct jctx *c, struct jscope *s, const struct jnode *n, struct jv v)
{
    const struct jv space = jlookup(c, s, n->name);
    if (space.type != J_SPACE)
        jfail(c, "cannot assign attribute on non-namespace object");
    jdict_set(c, space.m, n->a->value, v);
}

static void assign(struct jctx *c, struct jscope *s, const struct jnode *n, struct jv v)
{
    jenter(c);
    if (n->type == E_NAME) {
        jbind(c, s, n->name, v);
    } else if (n->type == E_NSREF) {
        set_attr(c, s, n, v);
    } else {
        if (v.type != J_UNDEF && !jiterable(v))
            jfail(c, "cannot unpack non-iterable %s object", jtype_name(v));
        const struct jspan items = jiter(c, v);
        if (items.n > n->list.n)
            jfail(c, "too many values to unpack (expected %zu)", n->list.n);
        if (items.n < n->list.n)
            jfail(c, "not enough values to unpack (expected %zu, got %zu)", n->list.n, items.n);
        for (size_t i = 0; i < items.n; i++)
            assign(c, s, n->list.v[i], items.v[i]);
    }
    jleave(c);
}

/* A chain of filters whose innermost value is `v`. */
static struct jv filtered(struct jctx *c, struct jscope *s, const struct jnode *n, struct jv v)
{
    if (n == NULL)
        return v;
    jenter(c);
    v = filtered(c, s, n->a, v);
    if (n->row == NULL)
        jfail(c, "there is no filter named '%.*s'", (int)n->name->s->len, n->name->s->s);
    const struct jargs a = jeval_args(c, s, n->args);
    c->line = n->line;
    v = jrow_run(c, n->row, v, &a);
    jleave(c);
    return v;
}

static enum flow run_set_block(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jout o = { 0 };
    const enum flow f = capture(c, inner(c, s), &n->list, &o);
    if (f == FLOW_ON)
        assign(c, s, n->a, filtered(c, s, n->b, jout_end(c, &o)));
    return f;
}

static enum flow run_filter_block(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jout o = { 0 };
    const enum flow f = capture(c, inner(c, s), &n->list, &o);
    if (f == FLOW_ON)
        jprint(c, c->out, filtered(c, s, n->b, jout_end(c, &o)));
    return f;
}

static enum flow run_with(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jscope *in = inner(c, s);
    struct jv *v = jalloc(c, n->d->list.n, sizeof *v);
    for (size_t i = 0; i < n->d->list.n; i++) /* all before any is set */
        v[i] = jeval(c, s, n->d->list.v[i]);
    for (size_t i = 0; i < n->a->list.n; i++)
        assign(c, in, n->a->list.v[i], v[i]);
    return run(c, in, &n->list);
}

/* --- loops ------------------------------------------------------------------------------------------ */

/* The next item that the loop's test lets pass; J_MISSING at the end. */
static struct jv loop_fetch(struct jctx *c, struct jloop *l)
{
    while (l->at < l->src.n) {
        const struct jv v = l->src.v[l->at++];
        if (!l->filtered)
            return v;
        struct jscope *s = inner(c, l->scope);
        assign(c, s, l->node->a, v);
        if (jtruth(jeval(c, s, l->node->d)))
            return v;
    }
    return (struct jv){ .type = J_MISSING };
}

static struct jv loop_peek(struct jctx *c, struct jloop *l)
{
    if (!jgiven(l->after))
        l->after = loop_fetch(c, l);
    return l->after;
}

static bool loop_next(struct jctx *c, struct jloop *l)
{
    const struct jv v = loop_peek(c, l);
    if (!jgiven(v))
        return false;
    l->after = (struct jv){ .type = J_MISSING };
    l->index0++;
    l->before = l->current;
    l->current = v;
    return true;
}

static int64_t loop_length(struct jctx *c, struct jloop *l)
{
    if (l->length >= 0)
        return l->length;
    const int64_t ahead = l->index0 + 1 + jgiven(l->after);
    if (!l->filtered) {
        l->length = ahead + (int64_t)(l->src.n - l->at);
        return l->length;
    }
    struct jseq *rest = jseq_new(c, SEQ_LIST, 0);
    for (struct jv v = loop_fetch(c, l); jgiven(v); v = loop_fetch(c, l))
        jseq_add(c, rest, v);
    l->src = (struct jspan){ rest->v, rest->n };
    l->at = 0;
    l->filtered = false;
    l->length = ahead + (int64_t)rest->n;
    return l->length;
}

static struct jv loop_cycle(struct jctx *c, struct jv self, const struct jargs *raw, struct jv *a)
{
    (void)a;
    if (raw->npos == 0)
        jfail(c, "no items for cycling given");
    /* cppcheck-suppress zerodivcond ; jfail() does not return */
    return raw->pos[(size_t)self.loop->index0 % raw->npos];
}

static struct jv loop_changed(struct jctx *c, struct jv self, const struct jargs *raw, struct jv *a)
{
    (void)a;
    struct jseq *q = jseq_new(c, SEQ_TUPLE, raw->npos);
    for (size_t i = 0; i < raw->npos; i++)
        jseq_add(c, q, raw->pos[i]);
    const bool same = jgiven(self.loop->changed) && jeq(c, self.loop->changed, jseqv(q));
    self.loop->changed = jseqv(q);
    return jbool(!same);
}

static struct jv bound_method(struct jctx *c, struct jloop *l, const struct jrow *row)
{
    struct jmethod *m = jalloc(c, 1, sizeof *m);
    m->self = (struct jv){ .type = J_LOOP, .loop = l };
    m->row = row;
    return (struct jv){ .type = J_METHOD, .method = m };
}

struct jv jloop_attr(struct jctx *c, struct jloop *l, const struct jstr *name)
{
    static const struct jrow cycle = { "cycle", loop_cycle, NULL, 0 };
    static const struct jrow changed = { "changed", loop_changed, NULL, 0 };
    if (jstr_is(name, "index"))
        return jint(l->index0 + 1);
    if (jstr_is(name, "index0"))
        return jint(l->index0);
    if (jstr_is(name, "first"))
        return jbool(l->index0 == 0);
    if (jstr_is(name, "last"))
        return jbool(!jgiven(loop_peek(c, l)));
    if (jstr_is(name, "length"))
        return jint(loop_length(c, l));
    if (jstr_is(name, "revindex"))
        return jint(loop_length(c, l) - l->index0);
    if (jstr_is(name, "revindex0"))
        return jint(loop_length(c, l) - l->index0 - 1);
    if (jstr_is(name, "previtem"))
        return l->index0 > 0 ? l->before : jundef_hint(c, "there is no previous item");
    if (jstr_is(name, "nextitem")) {
        const struct jv v = loop_peek(c, l);
        return jgiven(v) ? v : jundef_hint(c, "there is no next item");
    }
    if (jstr_is(name, "depth"))
        return jint(l->depth0 + 1);
    if (jstr_is(name, "depth0"))
        return jint(l->depth0);
    if (jstr_is(name, "cycle"))
        return bound_method(c, l, &cycle);
    if (jstr_is(name, "changed"))
        return bound_method(c, l, &changed);
    return (struct jv){ .type = J_MISSING };
}

static enum flow run_loop(struct jctx *c, struct jscope *s, const struct jnode *n, struct jv over,
                          int64_t depth0)
{
    struct jloop *l = jalloc(c, 1, sizeof *l);
    *l = (struct jloop){ .node = n, .scope = s, .src = jiter(c, over), .filtered = n->d != NULL,
                         .index0 = -1, .length = -1, .depth0 = depth0 };
    bool whole = false; /* one round at least went through: Jinja's idea of a loop that ran */
    while (loop_next(c, l)) {
        struct jscope *in = inner(c, s);
        jcharge(c, 1);
        jbind(c, in, c->t->loop, (struct jv){ .type = J_LOOP, .loop = l });
        c->line = n->line;
        assign(c, in, n->a, l->current);
        const enum flow f = run(c, in, &n->list);
        if (f == FLOW_BREAK)
            break;
        whole |= f == FLOW_ON;
    }
    return whole ? FLOW_ON : run(c, inner(c, s), &n->other);
}

struct jv jloop_call(struct jctx *c, struct jloop *l, const struct jargs *a)
{
    if (!l->node->recursive)
        jfail(c, "the loop must have the 'recursive' marker to be called recursively");
    if (a->npos != 1 || a->nkw > 0)
        jfail(c, "loop() takes one argument");
    struct jout o = { 0 }, *before = c->out;
    c->out = &o;
    run_loop(c, l->scope, l->node, a->pos[0], l->depth0 + 1);
    c->out = before;
    return jout_end(c, &o);
}

/* --- macros ----------------------------------------------------------------------------------------- */

/* The value of a keyword, taken out of `kw`; J_MISSING if it is not there. */
static struct jv take_kw(struct jargs *a, const struct jname *name)
{
    for (size_t i = 0; i < a->nkw; i++) {
        if (a->kw[i].name.s->len != name->s->len ||
            memcmp(a->kw[i].name.s->s, name->s->s, name->s->len) != 0)
            continue;
        const struct jv v = a->kw[i].value;
        memmove(&a->kw[i], &a->kw[i + 1], (a->nkw - i - 1) * sizeof *a->kw);
        a->nkw--;
        return v;
    }
    return (struct jv){ .type = J_MISSING };
}

static void bind_rest(struct jctx *c, struct jscope *s, const struct jmacro_def *d,
                      struct jargs *a)
{
    const char *name = d->name ? jstr_z(c, d->name->s) : "caller";
    if (d->caller) {
        const struct jv v = take_kw(a, c->t->caller);
        jbind(c, s, c->t->caller, jgiven(v) ? v : jundef_hint(c, "No caller defined"));
    }
    if (d->kwargs) {
        struct jdict *m = jdict_new(c);
        for (size_t i = 0; i < a->nkw; i++)
            jdict_set(c, m, a->kw[i].name, a->kw[i].value);
        jbind(c, s, c->t->kwargs, jdictv(m));
    } else if (a->nkw > 0) {
        jfail(c, "macro '%s' takes no keyword argument '%.*s'", name, (int)a->kw[0].name.s->len,
              a->kw[0].name.s->s);
    }
    if (d->varargs) {
        struct jseq *q = jseq_new(c, SEQ_TUPLE, 0);
        for (size_t i = d->nparam; i < a->npos; i++)
            jseq_add(c, q, a->pos[i]);
        jbind(c, s, c->t->varargs, jseqv(q));
    } else if (a->npos > d->nparam) {
        jfail(c, "macro '%s' takes not more than %zu argument(s)", name, d->nparam);
    }
}

struct jv jmacro_call(struct jctx *c, const struct jmacro *m, const struct jargs *given)
{
    const struct jmacro_def *d = m->def;
    struct jscope *s = inner(c, m->scope);
    struct jargs a = *given;
    struct jv *v = jalloc(c, d->nparam, sizeof *v);
    a.kw = jalloc(c, a.nkw, sizeof *a.kw);
    if (a.nkw > 0)
        memcpy(a.kw, given->kw, a.nkw * sizeof *a.kw);
    for (size_t i = 0; i < d->nparam; i++)
        v[i] = i < a.npos ? a.pos[i] : take_kw(&a, d->param[i]);
    bind_rest(c, s, d, &a);
    const size_t first = d->nparam - d->defaults.n;
    for (size_t i = 0; i < d->nparam; i++) {
        if (!jgiven(v[i]) && i >= first)
            v[i] = jeval(c, s, d->defaults.v[i - first]);
        if (!jgiven(v[i]))
            v[i] = jundef_hint(c, "parameter '%.*s' was not provided", (int)d->param[i]->s->len,
                               d->param[i]->s->s);
        jbind(c, s, d->param[i], v[i]);
    }
    struct jout o = { 0 };
    capture(c, s, &d->body, &o);
    return jout_end(c, &o);
}

static struct jv macro_value(struct jctx *c, struct jscope *s, const struct jmacro_def *d)
{
    struct jmacro *m = jalloc(c, 1, sizeof *m);
    m->def = d;
    m->scope = s;
    return (struct jv){ .type = J_MACRO, .macro = m };
}

static void run_call_block(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    const struct jv f = jeval(c, s, n->a->a);
    struct jargs a = jeval_args(c, s, n->a->args);
    for (size_t i = 0; i < a.nkw; i++)
        if (jstr_is(a.kw[i].name.s, "caller"))
            jfail(c, "a call block cannot have an argument 'caller'");
    a.kw[a.nkw++] = (struct jkw){ { .type = J_STR, .s = c->t->caller->s },
                                  macro_value(c, s, n->macro) };
    c->line = n->line;
    jprint(c, c->out, jcall(c, f, &a));
}

/* --- all of them --------------------------------------------------------------------------------------- */

static struct jscope *outermost(struct jscope *s)
{
    while (s->parent != NULL)
        s = s->parent;
    return s;
}

static enum flow run_one(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    switch (n->type) {
    case N_DATA: jout_str(c, c->out, n->value.s); return FLOW_ON;
    case N_PRINT:
        for (size_t i = 0; i < n->list.n; i++)
            jprint(c, c->out, jeval(c, s, n->list.v[i]));
        return FLOW_ON;
    case N_IF: return run(c, s, jtruth(jeval(c, s, n->a)) ? &n->list : &n->other);
    case N_FOR: return run_loop(c, s, n, jeval(c, s, n->b), 0);
    case N_SET: assign(c, s, n->a, jeval(c, s, n->b)); return FLOW_ON;
    case N_SETBLOCK: return run_set_block(c, s, n);
    case N_MACRO: jbind(c, s, n->macro->name, macro_value(c, s, n->macro)); return FLOW_ON;
    case N_CALLBLOCK: run_call_block(c, s, n); return FLOW_ON;
    case N_FILTERBLOCK: return run_filter_block(c, s, n);
    case N_WITH: return run_with(c, s, n);
    case N_BLOCK: return run(c, inner(c, n->recursive ? s : outermost(s)), &n->list);
    case N_BREAK: return FLOW_BREAK;
    default: return FLOW_CONTINUE; /* the parser makes no others */
    }
}

static enum flow run(struct jctx *c, struct jscope *s, const struct jnodes *l)
{
    enum flow f = FLOW_ON;
    jenter(c);
    for (size_t i = 0; i < l->n && f == FLOW_ON; i++) {
        jcharge(c, 1);
        c->line = l->v[i]->line;
        f = run_one(c, s, l->v[i]);
    }
    jleave(c);
    return f;
}

/* --- public ----------------------------------------------------------------------------------------- */

static void render(struct jctx *c, const json_t *vars, struct buf *ret)
{
    struct jout o = { 0 };
    c->out = &o; /* cppcheck-suppress autoVariables */
    c->vars = json_is_object(vars) ? jfrom_json(c, vars).m : jdict_new(c);
    run(c, inner(c, NULL), &c->t->body);
    const int rc = buf_add(ret, o.s != NULL ? o.s : "", o.len);
    if (rc != ERR_OK)
        jfail_plain(c, rc, NULL, rc == ERR_NOMEM ? "out of memory"
                                                 : "the text of the chat template is too long");
}

/* Apart from the rest, so that no variable lives across setjmp(). */
__attribute__((noinline)) static int attempt(struct jctx *c, const json_t *vars, struct buf *ret)
{
    if (setjmp(c->jump) == 0)
        render(c, vars, ret);
    return c->rc;
}

int jinja_render(const struct jinja *t, const json_t *vars, const struct jinja_opts *o,
                 struct buf *ret, struct err *err)
{
    const struct jinja_opts l = o != NULL ? *o : (struct jinja_opts){ .now = 0 };
    struct err own = { 0 };
    struct jctx *c = calloc(1, sizeof *c);
    if (c == NULL)
        return err_nomem(err);
    *c = (struct jctx){ .t = t, .name = t->mem.name, .err = err ? err : &own,
                        .steps = l.left ? *l.left : l.steps ? l.steps : 20000000,
                        .max = l.memory ? l.memory : (size_t)256 << 20,
                        .max_output = l.output ? l.output : (size_t)64 << 20,
                        .now = l.now ? (time_t)l.now : time(NULL) };
    const int rc = attempt(c, vars, ret);
    if (l.left != NULL)
        *l.left = c->steps;
    jctx_free(c);
    free(c);
    return rc;
}
