/* support_golden.c - see the header. */
#include "tests/support_golden.h"

#include "engine/safetensors.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char *path_of(const char *trace, const char *file)
{
    char relative[256];
    snprintf(relative, sizeof relative, "golden/train/%s/%s", trace, file);
    const char *path = support_shared(relative);
    if (path == NULL)
        skip();
    return path;
}

struct golden golden_load(const char *trace, const char *file)
{
    char name[128];
    struct st_file *f = NULL;
    struct err err = { 0 };
    snprintf(name, sizeof name, "%s.safetensors", file);
    if (st_open(path_of(trace, name), &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    struct golden g = { .n = f->ntensors };
    g.tensors = calloc(g.n + 1, sizeof *g.tensors);
    assert_non_null(g.tensors);
    for (size_t i = 0; i < g.n; i++) {
        const struct st_tensor *from = &f->tensors[i];
        struct golden_tensor *t = &g.tensors[i];
        snprintf(t->name, sizeof t->name, "%s", from->name);
        t->n = st_count(from);
        t->rows = (int)from->shape[0];
        t->cols = from->ndim > 1 ? (int)from->shape[1] : 1;
        t->data = malloc((t->n + 1) * sizeof *t->data);
        assert_non_null(t->data);
        if (st_f32(from, 0, t->n, t->data, &err) != ERR_OK)
            fail_msg("%s", err.msg);
    }
    st_close(f);
    return g;
}

void golden_free(struct golden *g)
{
    for (size_t i = 0; i < g->n; i++)
        free(g->tensors[i].data);
    free(g->tensors);
    *g = (struct golden){ 0 };
}

const struct golden_tensor *golden_find(const struct golden *g, const char *name)
{
    for (size_t i = 0; i < g->n; i++)
        if (strcmp(g->tensors[i].name, name) == 0)
            return &g->tensors[i];
    fail_msg("the reference has no tensor %s", name);
    return NULL;
}

json_t *golden_trace(const char *trace)
{
    json_error_t e;
    json_t *root = json_load_file(path_of(trace, "trace.json"), 0, &e);
    if (root == NULL)
        fail_msg("%s: %s", trace, e.text);
    return root;
}

double golden_number(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    if (!json_is_number(v))
        fail_msg("the reference has no number %s", key);
    return json_number_value(v);
}
