/* support_base.c - random models imported and loaded, for tests; see support_model.h. */
#include "tests/support_model.h"

#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>

static void must(int rc, const struct err *err)
{
    if (rc == ERR_OK)
        return;
    fprintf(stderr, "test support: %s\n", err->msg);
    abort();
}

struct base *support_base_dir(const char *dir, const char *type, const char *head,
                              enum precision precision)
{
    struct err err = { 0 };
    struct base *base = NULL;
    char tmp[64];
    support_tmpdir(tmp);
    char *path = path_join(tmp, "model.base");
    const struct base_import_opts opts = { .type = type, .head = head };
    must(base_import(dir, path, &opts, &err), &err);
    must(base_load(path, precision, false, &base, &err), &err);
    free(path);
    support_remove(tmp);
    return base;
}

struct base *support_base(const struct support_model *m, const char *type, const char *head,
                          enum precision precision)
{
    char tmp[64];
    support_tmpdir(tmp);
    support_model_write(m, tmp);
    struct base *base = support_base_dir(tmp, type, head, precision);
    support_remove(tmp);
    return base;
}

struct base *support_base_config(const char *config, const char *type, enum precision precision)
{
    char tmp[64];
    support_tmpdir(tmp);
    support_config_write(config, 1, tmp);
    struct base *base = support_base_dir(tmp, type, NULL, precision);
    support_remove(tmp);
    return base;
}
