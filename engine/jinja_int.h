/* jinja_int.h - what the parts of the Jinja interpreter share.
 *
 *   jinja_lex.c      text -> tokens, with Jinja's rules for white space around tags
 *   jinja_parse.c    tokens -> tree: statements; jinja_expr.c: expressions
 *   jinja_exec.c     statements -> text: loops, macros, assignments; jinja_render()
 *   jinja_eval.c     expressions -> values; jinja_ops.c: operators
 *   jinja_filter.c   {{ x | filter }}; jinja_filter_seq.c: those over sequences
 *   jinja_test.c     {{ x is test }}
 *   jinja_method.c   x.method(), the global functions
 *   jinja_value.c    memory, values, sequences, dicts, comparison
 *   jinja_text.c     strings: Unicode, slices, search, case; jinja_repr.c: values as text and JSON
 *   jinja_printf.c   "%s" % x
 *
 * Memory and failure: everything that a parse or a rendering allocates lies in the arena of its
 * `struct jctx` and is freed with it.  So a failure needs no cleaning up on its way: jfail() records
 * the sentence and jumps to the one setjmp in jinja_parse() or jinja_render().  Functions here
 * therefore return their result and nothing else.  No function that takes a jctx may hold memory of
 * another kind.
 *
 * Values are immutable once made (dicts and sequences are filled by whoever makes them), except
 * namespaces, generators (which are used up) and loops. */
#ifndef ENGINE_JINJA_INT_H
#define ENGINE_JINJA_INT_H

#include "engine/jinja.h"

#include <setjmp.h>
#include <stdbool.h>
#include <time.h>

/* --- memory and failure (jinja_value.c) ------------------------------------------------------ */

struct jblock;

/* Nested calls of ours that one rendering may have; about 100 KiB of stack per hundred. */
enum { JDEPTH_MAX = 600 };

struct jscope;
struct jout;

struct jctx {
    struct jblock *heap, *text; /* newest first; text holds the bytes of strings only, see jcat() */
    size_t used, max;           /* bytes of blocks */
    jmp_buf jump;
    struct err *err;
    int rc;
    const char *name;           /* of the template */
    int line;                   /* where we are, for messages */
    int64_t steps;              /* left */
    int depth;
    size_t max_output;
    /* rendering only */
    const struct jinja *t;
    struct jout *out;
    struct jdict *vars;
    time_t now;
};

_Noreturn void jfail(struct jctx *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same without "NAME, line N: ". */
_Noreturn void jfail_plain(struct jctx *c, int rc, const char *slug, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
void *jalloc(struct jctx *c, size_t n, size_t size); /* zeroed */
char *jbytes(struct jctx *c, size_t n);
void jctx_free(struct jctx *c);
void jcharge(struct jctx *c, size_t n); /* n items or pieces of text were touched */
void jenter(struct jctx *c);
static inline void jleave(struct jctx *c) { c->depth--; }

/* --- values ------------------------------------------------------------------------------------ */

enum jtype {
    J_MISSING, /* an argument that was not given; never a template's value */
    J_UNDEF, J_NONE, J_BOOL, J_INT, J_FLOAT, J_STR, J_SEQ, J_DICT, J_SPACE, J_MACRO, J_FUNC,
    J_METHOD, J_LOOP,
};

struct jv {
    enum jtype type;
    union {
        bool b;
        int64_t i;
        double d;
        const struct jstr *s;
        struct jseq *q;
        struct jdict *m;             /* J_DICT and J_SPACE */
        const struct jundef *undef;
        const struct jmacro *macro;
        const struct jrow *func;
        const struct jmethod *method;
        struct jloop *loop;
    };
};

struct jstr {
    const char *s;  /* valid UTF-8, not NUL-terminated */
    size_t len;
    size_t chars;   /* code points */
    bool safe;      /* what Python calls Markup: text added to it gets escaped for HTML */
};

enum jseq_kind { SEQ_LIST, SEQ_TUPLE, SEQ_GROUP /* a tuple of groupby */, SEQ_RANGE, SEQ_KEYS,
                 SEQ_VALUES, SEQ_ITEMS, SEQ_GEN /* may be walked once */ };
struct jseq {
    enum jseq_kind kind;
    size_t n, cap;
    struct jv *v;
    int64_t start, stop, step; /* SEQ_RANGE, for printing */
};

struct jpair { struct jv key, value; uint64_t hash; };
struct jdict {
    size_t n, cap;
    struct jpair *e;    /* in order of insertion */
    uint32_t *index;    /* open addressing, position + 1; NULL while small */
    size_t nindex;
};

/* Why there is no value: a sentence, or the name that `of` lacks (J_MISSING: no such variable). */
struct jundef { const char *hint; struct jv of, name; };

struct jspan { struct jv *v; size_t n; };

/* Arguments of a call. */
struct jkw { struct jv name, value; };
struct jargs { struct jv *pos; size_t npos; struct jkw *kw; size_t nkw; };

/* A filter, test, method or function.  `params` names the parameters after the value, the first
 * `required` of which must be given; they arrive in `a`, J_MISSING where not given.  NULL: `raw` is
 * read by the function itself. */
typedef struct jv (*jfn)(struct jctx *c, struct jv self, const struct jargs *raw, struct jv *a);
struct jrow { const char *name; jfn run; const char *params; int required; };
enum { JPARAMS_MAX = 6 };
struct jmethod { struct jv self; const struct jrow *row; };

static inline struct jv jnone(void) { return (struct jv){ .type = J_NONE }; }
static inline struct jv jbool(bool b) { return (struct jv){ .type = J_BOOL, .b = b }; }
static inline struct jv jint(int64_t i) { return (struct jv){ .type = J_INT, .i = i }; }
static inline struct jv jfloat(double d) { return (struct jv){ .type = J_FLOAT, .d = d }; }
static inline struct jv jseqv(struct jseq *q) { return (struct jv){ .type = J_SEQ, .q = q }; }
static inline struct jv jdictv(struct jdict *m) { return (struct jv){ .type = J_DICT, .m = m }; }
static inline bool jgiven(struct jv v) { return v.type != J_MISSING; }
static inline bool jis_gen(struct jv v) { return v.type == J_SEQ && v.q->kind == SEQ_GEN; }

struct jv jundef(struct jctx *c, struct jv of, struct jv name);
struct jv jundef_hint(struct jctx *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void jfail_undef(struct jctx *c, struct jv v);
const char *jtype_name(struct jv v); /* Python's: "str", "NoneType" */

bool jtruth(struct jv v);
bool jeq(struct jctx *c, struct jv a, struct jv b);
/* Negative, 0, positive; fails where Python cannot order them (`op` is for the message). */
int jcompare(struct jctx *c, struct jv a, struct jv b, const char *op);
/* 64-bit value of an int or bool; false for other types. */
bool jget_int(struct jv v, int64_t *ret);
bool jis_number(struct jv v);
double jnumber(struct jv v);

struct jseq *jseq_new(struct jctx *c, enum jseq_kind kind, size_t cap);
void jseq_add(struct jctx *c, struct jseq *q, struct jv v);
struct jdict *jdict_new(struct jctx *c);
void jdict_set(struct jctx *c, struct jdict *m, struct jv key, struct jv value);
/* J_MISSING if it is not there; fails for a key that cannot be hashed. */
struct jv jdict_get(struct jctx *c, const struct jdict *m, struct jv key);
struct jv jdict_str(struct jctx *c, const struct jdict *m, const char *key);

/* The items of what can be iterated; a generator is used up by it. */
struct jspan jiter(struct jctx *c, struct jv v);
bool jiterable(struct jv v);
size_t jlen(struct jctx *c, struct jv v);
struct jv jfrom_json(struct jctx *c, const json_t *j);
/* Stable.  `keys` and the items move together. */
void jsort(struct jctx *c, struct jv *keys, struct jv *items, size_t n, bool reverse);

/* --- text (jinja_text.c) ----------------------------------------------------------------------- */

/* Text that grows in the arena. */
struct jout { char *s; size_t len, cap; };
void jout_add(struct jctx *c, struct jout *o, const char *s, size_t n);
void jout_puts(struct jctx *c, struct jout *o, const char *s);
void jout_str(struct jctx *c, struct jout *o, const struct jstr *s);
void jout_char(struct jctx *c, struct jout *o, uint32_t cp);
struct jv jout_end(struct jctx *c, const struct jout *o); /* the string */

struct jv jstrn(struct jctx *c, const char *s, size_t len); /* copies */
struct jv jstrz(struct jctx *c, const char *s);             /* copies */
/* Does not copy: `s` outlives the context. */
struct jv jstr_borrow(struct jctx *c, const char *s, size_t len);
struct jv jstr_part(struct jctx *c, const struct jstr *s, size_t from, size_t to); /* bytes */
struct jv jstr_safe(struct jctx *c, struct jv s, bool safe);
struct jv jcat(struct jctx *c, const struct jstr *a, const struct jstr *b);
struct jv jescape(struct jctx *c, struct jv v);             /* HTML; the result is safe */
bool jstr_is(const struct jstr *s, const char *z);
const char *jstr_z(struct jctx *c, const struct jstr *s);   /* NUL-terminated copy */

size_t jdecode(const char *s, uint32_t *ret);  /* one code point of valid UTF-8: its bytes */
size_t jencode(uint32_t cp, char ret[4]);
size_t jdecode_back(const char *s, size_t len, uint32_t *ret); /* the one that ends at s[len] */
bool jspace(uint32_t cp);                      /* Python's str.isspace */
bool jprintable(uint32_t cp);
bool jletter(uint32_t cp);
bool jword(uint32_t cp);                       /* \w */
size_t jchar_at(const struct jstr *s, size_t index); /* byte offset of a code point */

enum { STRIP_LEFT = 1, STRIP_RIGHT = 2 };
struct jv jstrip(struct jctx *c, const struct jstr *s, struct jv chars, int sides);
enum jcase { CASE_LOWER, CASE_UPPER, CASE_TITLE, CASE_CAPITAL, CASE_SWAP };
struct jv jcase(struct jctx *c, const struct jstr *s, enum jcase how);
/* First place at or after byte `from`, or SIZE_MAX. */
size_t jfind(struct jctx *c, const struct jstr *s, const struct jstr *what, size_t from);
struct jv jreplace(struct jctx *c, const struct jstr *s, const struct jstr *old,
                   const struct jstr *new, int64_t count);
struct jv jsplit(struct jctx *c, const struct jstr *s, struct jv sep, int64_t max, bool from_right);
struct jv jsplitlines(struct jctx *c, const struct jstr *s, bool keep);
struct jv jpad(struct jctx *c, const struct jstr *s, int64_t width, struct jv fill, int where);

/* --- values as text (jinja_repr.c) ------------------------------------------------------------- */

struct jv jtostr(struct jctx *c, struct jv v);  /* str(v): plain */
struct jv jsoft(struct jctx *c, struct jv v);   /* the same, but what is safe stays safe */
void jprint(struct jctx *c, struct jout *o, struct jv v);
void jrepr(struct jctx *c, struct jout *o, struct jv v);
void jfloat_text(double d, char ret[32]);       /* Python's repr */
struct jv jtojson(struct jctx *c, struct jv self, const struct jargs *raw, struct jv *a);

/* --- operators ----------------------------------------------------------------------------------- */

enum jop { OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_FLOORDIV, OP_MOD, OP_POW, OP_EQ, OP_NE, OP_LT, OP_LE,
           OP_GT, OP_GE, OP_IN, OP_NOTIN };
struct jv jbinary(struct jctx *c, enum jop op, struct jv a, struct jv b);
bool jrelation(struct jctx *c, enum jop op, struct jv a, struct jv b);
bool jcontains(struct jctx *c, struct jv in, struct jv what);
struct jv jnegate(struct jctx *c, struct jv v, bool minus);
struct jv jprintf(struct jctx *c, const struct jstr *fmt, struct jv args);

/* obj.name and obj[key], as the sandbox has them. */
struct jv jattr(struct jctx *c, struct jv obj, struct jv name);
struct jv jitem(struct jctx *c, struct jv obj, struct jv key);
struct jv jslice(struct jctx *c, struct jv obj, struct jv from, struct jv to, struct jv step);
struct jv jcall(struct jctx *c, struct jv f, const struct jargs *a);
/* Sorts raw arguments into the parameters of `row` and runs it. */
struct jv jrow_run(struct jctx *c, const struct jrow *row, struct jv self, const struct jargs *a);

/* Rows by name, NULL if there is none. */
const struct jrow *jfilter_find(const char *name, size_t len);
const struct jrow *jtest_find(const char *name, size_t len);
const struct jrow *jmethod_find(struct jv self, const struct jstr *name);
bool jmethod_unsafe(struct jv self, const struct jstr *name); /* would change a list or dict */
struct jv jglobal(const struct jstr *name);                   /* J_MISSING if there is none */
extern const struct jrow jfilters_seq[];                      /* ends with a NULL name */

/* --- the tree -------------------------------------------------------------------------------------- */

enum jnode_type {
    N_DATA, N_PRINT, N_IF, N_FOR, N_SET, N_SETBLOCK, N_MACRO, N_CALLBLOCK, N_FILTERBLOCK, N_WITH,
    N_BLOCK, N_BREAK, N_CONTINUE,
    E_CONST, E_NAME, E_TUPLE, E_LIST, E_DICT, E_ATTR, E_ITEM, E_SLICE, E_CALL, E_FILTER, E_TEST,
    E_COND, E_AND, E_OR, E_NOT, E_NEG, E_POS, E_BINARY, E_COMPARE, E_CONCAT, E_NSREF,
};

struct jname { const struct jstr *s; struct jname *next; }; /* one per spelling and template */

struct jnodes { struct jnode **v; size_t n, cap; };
struct jnargs {
    struct jnodes pos, kw;
    const struct jname **kwname;
    struct jnode *star, *stars;
};

struct jnode {
    enum jnode_type type;
    int line;
    enum jop op;
    struct jnode *a, *b, *d;     /* operands; N_IF: test; N_FOR: target, iterable, test */
    struct jnodes list, other;   /* body and else; items; keys and values */
    enum jop *ops;               /* E_COMPARE: one per item of `list` */
    const struct jname *name;
    struct jv value;             /* E_CONST, N_DATA */
    struct jnargs *args;         /* E_CALL, E_FILTER, E_TEST */
    const struct jrow *row;      /* E_FILTER, E_TEST; NULL: no such one, an error when it runs */
    struct jmacro_def *macro;    /* N_MACRO, N_CALLBLOCK */
    bool recursive;              /* N_FOR */
    bool soft;                   /* E_FILTER, E_TEST: inside a condition */
};

struct jmacro_def {
    const struct jname *name;    /* NULL: the body of a call block */
    struct jnodes defaults;      /* of the last parameters */
    const struct jname **param;
    size_t nparam;
    bool caller, varargs, kwargs; /* used in the body */
    struct jnodes body;
};

struct jinja {
    struct jctx mem;             /* owns the tree */
    struct jnodes body;
    struct jname *names;
    const struct jname *loop, *caller, *varargs, *kwargs;
};

/* --- lexer ------------------------------------------------------------------------------------- */

enum jtok_type {
    T_EOF, T_DATA, T_BLOCK_BEGIN, T_BLOCK_END, T_VAR_BEGIN, T_VAR_END, T_NAME, T_STRING, T_INT,
    T_FLOAT, T_OP,
};
struct jtok {
    enum jtok_type type;
    int line;
    char op[3];            /* T_OP: "+", "//" */
    const char *s;         /* T_NAME, T_DATA */
    size_t len;
    struct jv value;       /* T_STRING, T_INT, T_FLOAT */
};
struct jtoks { struct jtok *v; size_t n, cap; };
/* `text` stays where it is as long as the tokens are used. */
struct jtoks jlex(struct jctx *c, const char *text, size_t len);

/* --- parser ------------------------------------------------------------------------------------- */

struct jparser {
    struct jctx *c;
    struct jinja *t;
    struct jtoks toks;
    size_t at;
    int loops;                   /* that break and continue may leave */
    int soft;                    /* ifs around us */
    struct jnodes unknown;       /* filters and tests that there are not */
    struct jmacro_def *macro;    /* innermost */
};
struct jtok *jtok(struct jparser *p);
bool jtok_op(struct jparser *p, const char *op);      /* is the current token this operator? */
bool jtok_name(struct jparser *p, const char *name);
bool jskip_op(struct jparser *p, const char *op);     /* and go past it if so */
bool jskip_name(struct jparser *p, const char *name);
void jexpect_op(struct jparser *p, const char *op);
_Noreturn void jparse_fail(struct jparser *p, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
const char *jtok_text(struct jparser *p, const struct jtok *t);
struct jnode *jnode_new(struct jparser *p, enum jnode_type type, int line);
void jnodes_add(struct jctx *c, struct jnodes *l, struct jnode *n);
const struct jname *jintern(struct jparser *p, const char *s, size_t len);

/* jinja_expr.c */
struct jnode *jexpr(struct jparser *p, bool with_condition);
/* `end`: a name that ends the tuple beside the closing tags, or NULL. */
struct jnode *jexpr_tuple(struct jparser *p, bool simplified, bool with_condition, const char *end,
                          bool parentheses);
struct jnode *jexpr_filter(struct jparser *p, struct jnode *on, bool begun);

/* --- running ------------------------------------------------------------------------------------ */

struct jbind { const struct jname *name; struct jv value; };
struct jscope {
    struct jscope *parent;
    struct jbind *v;
    size_t n, cap;
};

struct jmacro { const struct jmacro_def *def; struct jscope *scope; };

struct jloop {
    const struct jnode *node;
    struct jscope *scope;        /* around the loop */
    struct jspan src;
    size_t at;                   /* of src: what comes next */
    bool filtered;               /* `node` has a test to apply */
    struct jv before, current, after, changed; /* J_MISSING: none */
    int64_t index0, length;      /* length -1: not known yet */
    int64_t depth0;
};

struct jv jeval(struct jctx *c, struct jscope *s, const struct jnode *n);
struct jargs jeval_args(struct jctx *c, struct jscope *s, const struct jnargs *a);
struct jv jlookup(struct jctx *c, const struct jscope *s, const struct jname *name);
void jbind(struct jctx *c, struct jscope *s, const struct jname *name, struct jv v);
struct jv jmacro_call(struct jctx *c, const struct jmacro *m, const struct jargs *a);
struct jv jloop_attr(struct jctx *c, struct jloop *l, const struct jstr *name); /* J_MISSING */
struct jv jloop_call(struct jctx *c, struct jloop *l, const struct jargs *a);

#endif
