/* torch_pickle.c - the part of the pickle format that a dict of tensors is written in.
 *
 * A small machine with a stack, a memo, and values that can do nothing: texts, numbers, tuples,
 * dicts, five kinds of names, storages and tensors.  Calling one of the known names makes a storage
 * or a tensor out of a tuple of the right form; there is nothing else to call.  The memory that values
 * take is bounded: a few instructions can make many of what was once put together. */
#include "engine/torch_file.h"

#include <stdlib.h>
#include <string.h>

/* 65534 tensors, as many as an archive has members, take about half of MEMORY_MAX. */
enum { PICKLE_MAX = 32 << 20, MEMORY_MAX = 256 << 20, TEXT_MAX = 255 };

enum kind {
    V_MARK, V_TEXT, V_INT, V_BOOL, V_TUPLE, V_DICT,
    V_REBUILD, V_ORDERED, V_STORAGE_TYPE, /* names */
    V_STORAGE, V_TENSOR,                  /* index into `tensors`; a storage has no shape yet */
};

struct value {
    enum kind kind;
    int64_t n;        /* number; tuple: elements; dict: which; storage type, tensor: index */
    size_t at;        /* tuple: first element in `parts` */
    const char *text;
};

/* key: value of a dict. */
struct entry {
    int64_t dict;
    struct value key, value;
};

struct list {
    void *p;
    size_t n, cap;
};

struct machine {
    const uint8_t *start, *p, *end;
    const char *what;
    struct err *err;
    struct list stack, memo, parts; /* of struct value */
    struct list entries, tensors;
    int64_t ndicts;
    size_t memory; /* of all lists, in bytes */
};

static const struct {
    const char *name;
    enum dtype dtype;
    const char *dtype_name;
    unsigned size;
} storages[] = {
    { "FloatStorage", DT_F32, "F32", 4 },      { "HalfStorage", DT_F16, "F16", 2 },
    { "BFloat16Storage", DT_BF16, "BF16", 2 }, { "DoubleStorage", DT_OTHER, "F64", 8 },
    { "LongStorage", DT_I64, "I64", 8 },       { "IntStorage", DT_I32, "I32", 4 },
    { "ByteStorage", DT_U8, "U8", 1 },
};

static int bad(struct machine *m, const char *why)
{
    return err_set(m->err, ERR_INVALID, "%s: its pickle is not a dict of tensors as torch.save() "
                   "writes it: %s", m->what, why);
}

/* Room for one more; NULL when there is none, and no_room() says why. */
static void *list_add(struct machine *m, struct list *l, size_t size)
{
    if (l->n == l->cap) {
        const size_t cap = l->cap > 0 ? 2 * l->cap : 64;
        m->memory += (cap - l->cap) * size;
        void *p = m->memory <= MEMORY_MAX ? realloc(l->p, cap * size) : NULL;
        if (p == NULL)
            return NULL;
        l->p = p;
        l->cap = cap;
    }
    return (char *)l->p + l->n++ * size;
}

static int no_room(struct machine *m)
{
    return m->memory > MEMORY_MAX ? bad(m, "it makes more values than any such dict has")
                                  : err_nomem(m->err);
}

static struct value *value_at(const struct list *l, size_t i) { return (struct value *)l->p + i; }

static int push(struct machine *m, struct value v)
{
    struct value *to = list_add(m, &m->stack, sizeof v);
    if (to == NULL)
        return no_room(m);
    *to = v;
    return ERR_OK;
}

static bool pop(struct machine *m, struct value *ret)
{
    if (m->stack.n == 0)
        return false;
    *ret = *value_at(&m->stack, --m->stack.n);
    return ret->kind != V_MARK;
}

static const uint8_t *take(struct machine *m, size_t n)
{
    const uint8_t *p = m->p;
    if ((size_t)(m->end - p) < n)
        return NULL;
    m->p += n;
    return p;
}

/* A little-endian number of n bytes. */
static bool number(struct machine *m, size_t n, uint32_t *ret)
{
    const uint8_t *p = take(m, n);
    *ret = 0;
    for (size_t i = 0; p != NULL && i < n; i++)
        *ret |= (uint32_t)p[i] << 8 * i;
    return p != NULL;
}

/* --- tuples and dicts -------------------------------------------------------------------------- */

/* The values above stack height `from` become a tuple. */
static int make_tuple(struct machine *m, size_t from)
{
    struct value v = { .kind = V_TUPLE, .n = (int64_t)(m->stack.n - from), .at = m->parts.n };
    for (size_t i = from; i < m->stack.n; i++) {
        struct value *to = list_add(m, &m->parts, sizeof *to);
        if (to == NULL)
            return no_room(m);
        *to = *value_at(&m->stack, i);
        if (to->kind == V_MARK)
            return bad(m, "a tuple holds a mark");
    }
    m->stack.n = from;
    return push(m, v);
}

/* Height of the stack above the last mark; the mark is at one less. */
static bool find_mark(const struct machine *m, size_t *ret)
{
    size_t n = m->stack.n;
    while (n > 0 && value_at(&m->stack, n - 1)->kind != V_MARK)
        n--;
    *ret = n;
    return n > 0;
}

static int marked_tuple(struct machine *m)
{
    size_t from;
    if (!find_mark(m, &from))
        return bad(m, "a tuple has no mark");
    int rc = make_tuple(m, from);
    if (rc != ERR_OK)
        return rc;
    *value_at(&m->stack, from - 1) = *value_at(&m->stack, from); /* over the mark */
    m->stack.n = from;
    return ERR_OK;
}

static int new_dict(struct machine *m)
{
    return push(m, (struct value){ .kind = V_DICT, .n = m->ndicts++ });
}

/* The pairs above stack height `from` go into the dict below them (and `below` more). */
static int set_items(struct machine *m, size_t from, size_t below)
{
    if (from < below + 1 || (m->stack.n - from) % 2 != 0 ||
        value_at(&m->stack, from - below - 1)->kind != V_DICT)
        return bad(m, "items are set on something that is not a dict");
    const int64_t dict = value_at(&m->stack, from - below - 1)->n;
    for (size_t i = from; i < m->stack.n; i += 2) {
        struct entry *e = list_add(m, &m->entries, sizeof *e);
        if (e == NULL)
            return no_room(m);
        *e = (struct entry){ dict, *value_at(&m->stack, i), *value_at(&m->stack, i + 1) };
    }
    m->stack.n = from - below;
    return ERR_OK;
}

/* --- names and calls --------------------------------------------------------------------------- */

static const char *line(struct machine *m, size_t *ret_len)
{
    const uint8_t *nl = memchr(m->p, '\n', (size_t)(m->end - m->p));
    if (nl == NULL)
        return NULL;
    const char *s = (const char *)m->p;
    *ret_len = (size_t)(nl - m->p);
    m->p = nl + 1;
    return s;
}

static bool is(const char *s, size_t n, const char *want)
{
    return n == strlen(want) && memcmp(s, want, n) == 0;
}

static int refuse_name(struct machine *m, const char *module, size_t k, const char *name, size_t n)
{
    char shown[128];
    size_t at = 0;
    for (size_t i = 0; i < k + 1 + n && at < sizeof shown - 1; i++) {
        const char c = i < k ? module[i] : i == k ? '.' : name[i - k - 1];
        shown[at++] = c > 0x20 && c < 0x7f ? c : '?';
    }
    shown[at] = '\0';
    return err_set(m->err, ERR_INVALID, "%s: its pickle names %s, which a dict of tensors does not "
                   "need: it might run code, and is not read", m->what, shown);
}

static int global(struct machine *m)
{
    size_t k = 0, n = 0;
    const char *module = line(m, &k), *name = module != NULL ? line(m, &n) : NULL;
    if (name == NULL)
        return bad(m, "it is cut off");
    if (is(module, k, "torch._utils") && is(name, n, "_rebuild_tensor_v2"))
        return push(m, (struct value){ .kind = V_REBUILD });
    if (is(module, k, "collections") && is(name, n, "OrderedDict"))
        return push(m, (struct value){ .kind = V_ORDERED });
    for (size_t i = 0; is(module, k, "torch") && i < sizeof storages / sizeof storages[0]; i++)
        if (is(name, n, storages[i].name))
            return push(m, (struct value){ .kind = V_STORAGE_TYPE, .n = (int64_t)i });
    return refuse_name(m, module, k, name, n);
}

/* Element i of a tuple. */
static const struct value *part(const struct machine *m, const struct value *tuple, int64_t i)
{
    return value_at(&m->parts, tuple->at + (size_t)i);
}

/* ("storage", type, key, device, elements) */
static int storage(struct machine *m)
{
    struct value v;
    if (!pop(m, &v) || v.kind != V_TUPLE || v.n != 5 || part(m, &v, 0)->kind != V_TEXT ||
        !is(part(m, &v, 0)->text, (size_t)part(m, &v, 0)->n, "storage") ||
        part(m, &v, 1)->kind != V_STORAGE_TYPE || part(m, &v, 2)->kind != V_TEXT ||
        part(m, &v, 3)->kind != V_TEXT || part(m, &v, 4)->kind != V_INT || part(m, &v, 4)->n < 0)
        return bad(m, "a storage has another form");
    struct torch_tensor *t = list_add(m, &m->tensors, sizeof *t);
    if (t == NULL)
        return no_room(m);
    const size_t type = (size_t)part(m, &v, 1)->n;
    *t = (struct torch_tensor){
        .key = part(m, &v, 2)->text, .key_len = (size_t)part(m, &v, 2)->n,
        .dtype = storages[type].dtype, .size = storages[type].size, .storage = part(m, &v, 4)->n,
    };
    memcpy(t->dtype_name, storages[type].dtype_name, strlen(storages[type].dtype_name) + 1);
    return push(m, (struct value){ .kind = V_STORAGE, .n = (int64_t)m->tensors.n - 1 });
}

/* A tuple of whole numbers from 0 on. */
static bool numbers(const struct machine *m, const struct value *v, int64_t ret[ST_MAX_DIMS])
{
    if (v->kind != V_TUPLE || v->n > ST_MAX_DIMS)
        return false;
    for (int64_t i = 0; i < v->n; i++) {
        ret[i] = part(m, v, i)->n;
        if (part(m, v, i)->kind != V_INT || ret[i] < 0)
            return false;
    }
    return true;
}

/* (storage, offset, shape, stride, requires_grad, hooks) */
static int rebuild(struct machine *m, const struct value *args)
{
    struct torch_tensor t;
    const struct value *a = args->n == 6 ? part(m, args, 0) : NULL;
    if (a == NULL || a[0].kind != V_STORAGE || a[1].kind != V_INT || a[1].n < 0 ||
        a[2].kind != V_TUPLE || a[3].kind != V_TUPLE || a[2].n != a[3].n || a[4].kind != V_BOOL ||
        a[5].kind != V_DICT)
        return bad(m, "a tensor has another form");
    t = ((struct torch_tensor *)m->tensors.p)[a[0].n];
    t.offset = a[1].n;
    t.ndim = (int)a[2].n;
    if (!numbers(m, &a[2], t.shape) || !numbers(m, &a[3], t.stride))
        return bad(m, "a tensor's shape or stride is not a few whole numbers");
    struct torch_tensor *to = list_add(m, &m->tensors, sizeof *to);
    if (to == NULL)
        return no_room(m);
    *to = t;
    return push(m, (struct value){ .kind = V_TENSOR, .n = (int64_t)m->tensors.n - 1 });
}

static int reduce(struct machine *m)
{
    struct value args, what;
    if (!pop(m, &args) || !pop(m, &what) || args.kind != V_TUPLE)
        return bad(m, "a call has no arguments");
    if (what.kind == V_REBUILD)
        return rebuild(m, &args);
    if (what.kind == V_ORDERED && args.n == 0)
        return new_dict(m);
    return bad(m, "something is called that is neither a tensor nor an empty dict");
}

/* --- the machine ------------------------------------------------------------------------------- */

static int text(struct machine *m)
{
    uint32_t n;
    if (!number(m, 4, &n) || n > TEXT_MAX)
        return bad(m, "a text is cut off or too long");
    const uint8_t *p = take(m, n);
    if (p == NULL || memchr(p, '\0', n) != NULL)
        return bad(m, "a text is cut off or has a zero byte");
    return push(m, (struct value){ .kind = V_TEXT, .n = n, .text = (const char *)p });
}

static int memo_put(struct machine *m, size_t bytes)
{
    uint32_t i;
    if (!number(m, bytes, &i) || i > m->memo.n || m->stack.n == 0 ||
        value_at(&m->stack, m->stack.n - 1)->kind == V_MARK)
        return bad(m, "the memo is used in another order");
    struct value *to = i == m->memo.n ? list_add(m, &m->memo, sizeof *to) : value_at(&m->memo, i);
    if (to == NULL)
        return no_room(m);
    *to = *value_at(&m->stack, m->stack.n - 1);
    return ERR_OK;
}

static int memo_get(struct machine *m, size_t bytes)
{
    uint32_t i;
    if (!number(m, bytes, &i) || i >= m->memo.n)
        return bad(m, "the memo has no such value");
    return push(m, *value_at(&m->memo, i));
}

static int integer(struct machine *m, size_t bytes)
{
    uint32_t n;
    if (!number(m, bytes, &n))
        return bad(m, "it is cut off");
    return push(m, (struct value){ .kind = V_INT, .n = bytes == 4 ? (int32_t)n : (int64_t)n });
}

/* Attributes of a dict (torch's _metadata): nothing that is used. */
static int build(struct machine *m)
{
    struct value state;
    if (!pop(m, &state) || state.kind != V_DICT || m->stack.n == 0 ||
        value_at(&m->stack, m->stack.n - 1)->kind != V_DICT)
        return bad(m, "attributes are set on something that is not a dict");
    return ERR_OK;
}

static int short_tuple(struct machine *m, size_t n)
{
    return m->stack.n < n ? bad(m, "a tuple lacks elements") : make_tuple(m, m->stack.n - n);
}

static int step(struct machine *m, uint8_t op)
{
    size_t from;
    switch (op) {
    case '}': return new_dict(m);
    case ')': return short_tuple(m, 0);
    case 0x85: return short_tuple(m, 1);
    case 0x86: return short_tuple(m, 2);
    case 0x87: return short_tuple(m, 3);
    case 't': return marked_tuple(m);
    case '(': return push(m, (struct value){ .kind = V_MARK });
    case 'X': return text(m);
    case 'J': return integer(m, 4);
    case 'K': return integer(m, 1);
    case 'M': return integer(m, 2);
    case 0x88: case 0x89: return push(m, (struct value){ .kind = V_BOOL, .n = op == 0x88 });
    case 'c': return global(m);
    case 'Q': return storage(m);
    case 'R': return reduce(m);
    case 'b': return build(m);
    case 'q': return memo_put(m, 1);
    case 'r': return memo_put(m, 4);
    case 'h': return memo_get(m, 1);
    case 'j': return memo_get(m, 4);
    case 's': return m->stack.n < 2 ? bad(m, "an item is missing") : set_items(m, m->stack.n - 2, 0);
    case 'u': return find_mark(m, &from) ? set_items(m, from, 1) : bad(m, "items have no mark");
    default:
        return err_set(m->err, ERR_INVALID, "%s: its pickle has the instruction 0x%02x at byte %zu, "
                       "which a dict of tensors does not need: it might run code, and is not read",
                       m->what, op, (size_t)(m->p - m->start) - 1);
    }
}

/* What is left at the end: one dict, all of whose values are tensors. */
static int collect(struct machine *m, struct torch_tensor **ret, size_t *ret_n)
{
    struct value dict;
    if (!pop(m, &dict) || dict.kind != V_DICT || m->stack.n != 0)
        return bad(m, "it ends without a dict");
    size_t n = 0;
    m->memory += (m->entries.n + 1) * sizeof(struct torch_tensor);
    struct torch_tensor *list = m->memory <= MEMORY_MAX ? calloc(m->entries.n + 1, sizeof *list) : NULL;
    if (list == NULL)
        return no_room(m);
    for (size_t i = 0; i < m->entries.n; i++) {
        const struct entry *e = (const struct entry *)m->entries.p + i;
        if (e->dict != dict.n)
            continue;
        if (e->key.kind != V_TEXT || e->key.n == 0 || e->value.kind != V_TENSOR) {
            free(list);
            return bad(m, "an entry is not a tensor under a name");
        }
        list[n] = ((const struct torch_tensor *)m->tensors.p)[e->value.n];
        list[n].name = e->key.text;
        list[n++].name_len = (size_t)e->key.n;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

static int run(struct machine *m, struct torch_tensor **ret, size_t *ret_n)
{
    const uint8_t *head = take(m, 2);
    if (head == NULL || head[0] != 0x80 || head[1] != 2)
        return bad(m, "it is not of protocol 2");
    for (;;) {
        const uint8_t *op = take(m, 1);
        if (op == NULL)
            return bad(m, "it is cut off");
        if (*op == '.')
            return m->p == m->end ? collect(m, ret, ret_n) : bad(m, "something follows its end");
        int rc = step(m, *op);
        if (rc != ERR_OK)
            return rc;
    }
}

int torch_pickle_read(const uint8_t *p, size_t len, const char *what, struct torch_tensor **ret,
                      size_t *ret_n, struct err *err)
{
    struct machine m = { .start = p, .p = p, .end = p + len, .what = what, .err = err };
    int rc = len <= PICKLE_MAX ? run(&m, ret, ret_n) : bad(&m, "it is larger than 32 MiB");
    free(m.stack.p);
    free(m.memo.p);
    free(m.parts.p);
    free(m.entries.p);
    free(m.tensors.p);
    return rc;
}
