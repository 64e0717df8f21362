/* cmd_tenant.c - `lorad tenant` and `lorad key`: who may use the server. */
#include "server/cmd.h"
#include "server/cmd_db.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* --- tenant -------------------------------------------------------------------------------- */
static const struct opt only_db[] = { OPT_DB, { .name = NULL } };
static const struct opt db_json[] = { OPT_DB, OPT_JSON, { .name = NULL } };

static int tenant_change(const struct opts *o, bool add)
{
    struct store *st;
    struct err err = { .code = ERR_OK };
    int64_t id;
    const char *name = opts_arg(o, 0);
    int code = db_open(o, add, &st);
    if (code != 0)
        return code;
    int rc = add ? store_tenant_add(st, name, &id, &err) : store_tenant_remove(st, name, &err);
    store_close(st);
    if (rc != ERR_OK)
        return db_fail(&err);
    printf("tenant %s %s\n", name, add ? "added" : "removed");
    return output_done();
}

static int tenant_add(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, only_db, "tenant add NAME --db FILE",
                                "Adds a tenant: an owner of adapters and keys that sees nothing of"
                                " the others.", 1, 1, &code);
    if (o == NULL)
        return code;
    code = tenant_change(o, true);
    opts_free(o);
    return code;
}

static int tenant_rm(int argc, char **argv)
{
    int code;
    struct opts *o = opts_parse(argc, argv, only_db, "tenant rm NAME --db FILE",
                                "Removes a tenant that has no adapters, and its keys.", 1, 1,
                                &code);
    if (o == NULL)
        return code;
    code = tenant_change(o, false);
    opts_free(o);
    return code;
}

static int print_tenants(const struct store_tenant *list, size_t n, bool json)
{
    char when[32];
    if (json) {
        json_t *all = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(all, json_pack("{s:s, s:I, s:I, s:I}", "name", list[i].name,
                                                 "adapters", (json_int_t)list[i].nadapters, "keys",
                                                 (json_int_t)list[i].nkeys, "created",
                                                 (json_int_t)(list[i].created_ms / 1000)));
        return json_print(all);
    }
    struct table t;
    table_init(&t, "TENANT\tADAPTERS\tKEYS\tCREATED");
    for (size_t i = 0; i < n; i++) {
        table_cell(&t, "%s", list[i].name);
        table_cell(&t, "%lld", (long long)list[i].nadapters);
        table_cell(&t, "%lld", (long long)list[i].nkeys);
        table_cell(&t, "%s", when_text(list[i].created_ms, when));
        table_end_row(&t);
    }
    return table_print(&t);
}

static int tenant_list(int argc, char **argv)
{
    int code;
    struct store *st;
    struct opts *o = opts_parse(argc, argv, db_json, "tenant list --db FILE [--json]", NULL, 0, 0,
                                &code);
    if (o == NULL)
        return code;
    code = db_open(o, false, &st);
    if (code == 0) {
        struct err err = { .code = ERR_OK };
        struct store_tenant *list;
        size_t n;
        if (store_tenant_list(st, &list, &n, &err) == ERR_OK) {
            code = print_tenants(list, n, opt_flag(o, "json"));
            free(list);
        } else {
            code = db_fail(&err);
        }
        store_close(st);
    }
    opts_free(o);
    return code;
}

int cmd_tenant(int argc, char **argv)
{
    static const struct subcmd table[] = {
        { "add", "NAME", "add a tenant", tenant_add },
        { "list", "", "list tenants", tenant_list },
        { "rm", "NAME", "remove a tenant without adapters", tenant_rm },
        { .name = NULL },
    };
    return subcmd_run("tenant", table, argc, argv);
}

/* --- key ----------------------------------------------------------------------------------- */
/* The key alone goes to stdout, so that KEY=$(lorad key create ...) works. */
static int print_new_key(const char *key, int64_t id, const char *tenant, bool json)
{
    if (json)
        return json_print(json_pack("{s:I, s:s, s:s}", "id", (json_int_t)id, "tenant", tenant,
                                    "key", key));
    fprintf(stderr, "Key %lld of tenant %s.  It is shown this once and kept nowhere:\n",
            (long long)id, tenant);
    printf("%s\n", key);
    return output_done();
}

static int key_create_in(struct store *st, const struct opts *o)
{
    struct err err = { .code = ERR_OK };
    char key[STORE_KEY_LEN + 1];
    int64_t tenant, id;
    const char *name = opt_str(o, "tenant");
    int rc = store_tenant_find(st, name, &tenant, &err);
    if (rc == ERR_OK)
        rc = store_key_create(st, tenant, opt_str(o, "label"), key, &id, &err);
    if (rc != ERR_OK)
        return db_fail(&err);
    return print_new_key(key, id, name, opt_flag(o, "json"));
}

static int key_create(int argc, char **argv)
{
    static const struct opt options[] = {
        OPT_DB,
        { "tenant", 0, "NAME", "default", "whose key", false },
        { "label", 0, "TEXT", "", "to recognise it by", false },
        OPT_JSON,
        { .name = NULL },
    };
    int code;
    struct store *st;
    struct opts *o = opts_parse(argc, argv, options, "key create --db FILE [--tenant NAME]",
                                "Makes an access key and prints it, this once.  As soon as there is"
                                " a key, the server asks for one.", 0, 0, &code);
    if (o == NULL)
        return code;
    code = db_open(o, true, &st);
    if (code == 0) {
        code = key_create_in(st, o);
        store_close(st);
    }
    opts_free(o);
    return code;
}

/* The tenant's name of an id, from the list of all of them. */
static const char *tenant_name(const struct store_tenant *list, size_t n, int64_t id)
{
    for (size_t i = 0; i < n; i++)
        if (list[i].id == id)
            return list[i].name;
    return "?";
}

static int print_keys(const struct store_key *k, size_t n, const struct store_tenant *tenants,
                      size_t nt, bool json)
{
    char when[32];
    if (json) {
        json_t *all = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(
                all, json_pack("{s:I, s:s, s:s, s:s, s:b, s:I, s:I}", "id", (json_int_t)k[i].id,
                               "tenant", tenant_name(tenants, nt, k[i].tenant), "prefix",
                               k[i].prefix, "label", k[i].label, "revoked", (int)k[i].revoked,
                               "created", (json_int_t)(k[i].created_ms / 1000), "last_used",
                               (json_int_t)(k[i].last_used_ms / 1000)));
        return json_print(all);
    }
    struct table t;
    table_init(&t, "ID\tTENANT\tKEY\tLABEL\tSTATE\tCREATED\tLAST USED");
    for (size_t i = 0; i < n; i++) {
        table_cell(&t, "%lld", (long long)k[i].id);
        table_cell(&t, "%s", tenant_name(tenants, nt, k[i].tenant));
        table_cell(&t, "%s...", k[i].prefix);
        table_cell(&t, "%s", k[i].label);
        table_cell(&t, "%s", k[i].revoked ? "revoked" : "good");
        table_cell(&t, "%s", when_text(k[i].created_ms, when));
        table_cell(&t, "%s", when_text(k[i].last_used_ms, when));
        table_end_row(&t);
    }
    return table_print(&t);
}

static int key_list_in(struct store *st, const struct opts *o)
{
    struct err err = { .code = ERR_OK };
    struct store_tenant *tenants = NULL;
    struct store_key *keys = NULL;
    size_t nt = 0, n = 0;
    int64_t tenant = 0;
    const char *only = opt_str(o, "tenant");
    int rc = only != NULL ? store_tenant_find(st, only, &tenant, &err) : ERR_OK;
    if (rc == ERR_OK)
        rc = store_tenant_list(st, &tenants, &nt, &err);
    if (rc == ERR_OK)
        rc = store_key_list(st, tenant, &keys, &n, &err);
    int code = rc == ERR_OK ? print_keys(keys, n, tenants, nt, opt_flag(o, "json"))
                            : db_fail(&err);
    free(keys);
    free(tenants);
    return code;
}

static int key_list(int argc, char **argv)
{
    static const struct opt options[] = {
        OPT_DB,
        { "tenant", 0, "NAME", NULL, "only this tenant's (default: all)", false },
        OPT_JSON,
        { .name = NULL },
    };
    int code;
    struct store *st;
    struct opts *o = opts_parse(argc, argv, options, "key list --db FILE [--tenant NAME]", NULL, 0,
                                0, &code);
    if (o == NULL)
        return code;
    code = db_open(o, false, &st);
    if (code == 0) {
        code = key_list_in(st, o);
        store_close(st);
    }
    opts_free(o);
    return code;
}

static int key_revoke(int argc, char **argv)
{
    int code;
    struct store *st;
    struct err err = { .code = ERR_OK };
    struct opts *o = opts_parse(argc, argv, only_db, "key revoke ID --db FILE",
                                "The key stops working at once, also on a running server.  ID is"
                                " the number that `lorad key list` shows.", 1, 1, &code);
    if (o == NULL)
        return code;
    char *end;
    errno = 0;
    const char *text = opts_arg(o, 0);
    long long id = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || end == text || id < 1) {
        code = fail(2, "\"%s\" is not the number of a key", text);
    } else if ((code = db_open(o, false, &st)) == 0) {
        if (store_key_revoke(st, id, &err) == ERR_OK) {
            printf("key %lld revoked\n", id);
            code = output_done();
        } else {
            code = db_fail(&err);
        }
        store_close(st);
    }
    opts_free(o);
    return code;
}

int cmd_key(int argc, char **argv)
{
    static const struct subcmd table[] = {
        { "create", "[--tenant NAME]", "make a key and print it once", key_create },
        { "list", "", "list keys: never the keys themselves", key_list },
        { "revoke", "ID", "make a key useless", key_revoke },
        { .name = NULL },
    };
    return subcmd_run("key", table, argc, argv);
}
