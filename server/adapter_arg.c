/* adapter_arg.c - adapters that commands name: a version in the database, or a folder. */
#include "server/cmd_adapter.h"

#include "engine/safetensors.h"

#include <stdio.h>
#include <string.h>

int adapter_read_base(const char *path, struct arch *ret_arch, char ret_hash[65], struct err *err)
{
    struct st_file *f;
    int rc = st_open(path, &f, err);
    if (rc != ERR_OK)
        return rc;
    const char *arch = st_meta(f, "lorad.arch"), *hash = st_meta(f, "lorad.hash");
    uint8_t bytes[32];
    if (arch == NULL || hash == NULL || !hex32_parse(hash, bytes))
        rc = err_set(err, ERR_INVALID, "%s is not a base file made by lorad import", path);
    else
        rc = arch_from_json(arch, ret_arch, err);
    if (rc == ERR_OK && ret_hash != NULL)
        hex32(bytes, ret_hash);
    st_close(f);
    return rc;
}

bool adapter_arg_is_dir(const struct opts *o, const char *ref)
{
    return opt_str(o, "db") == NULL || ref[0] == '.' || ref[0] == '/';
}

static int open_version(const struct opts *o, const char *ref, struct adapter_arg *ret,
                        struct err *err)
{
    const char *db = opt_str(o, "db");
    struct store *st;
    struct store_version v = { 0 };
    int64_t tenant;
    if (!file_exists(db))
        return err_set(err, ERR_NOT_FOUND, "there is no database %s", db);
    int rc = store_open(db, &st, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_tenant_find(st, opt_str(o, "tenant"), &tenant, err);
    if (rc == ERR_OK)
        rc = store_version_find(st, tenant, ref, &v, err);
    if (rc == ERR_OK)
        rc = store_version_load(st, v.id, &ret->src, err);
    if (rc == ERR_OK) {
        snprintf(ret->label, sizeof ret->label, "%s@%d", v.name, v.version);
        memcpy(ret->base_hash, v.base_hash_hex, sizeof ret->base_hash);
    }
    store_version_free(&v);
    store_close(st);
    return rc;
}

int adapter_arg_open(const struct opts *o, const char *ref, const struct arch *arch,
                     struct adapter_arg *ret, struct err *err)
{
    struct arch own;
    *ret = (struct adapter_arg){ 0 };
    if (!adapter_arg_is_dir(o, ref))
        return open_version(o, ref, ret, err);
    if (arch == NULL) {
        if (opt_str(o, "base") == NULL)
            return err_set(err, ERR_INVALID,
                           "%.200s is a folder: say which base it is for (--base FILE), or name a "
                           "database (--db FILE)",
                           ref);
        int rc = adapter_read_base(opt_str(o, "base"), &own, NULL, err);
        if (rc != ERR_OK)
            return rc;
        arch = &own;
    }
    const size_t len = strlen(ref), cap = sizeof ret->label - 1;
    snprintf(ret->label, sizeof ret->label, "%s", ref + (len > cap ? len - cap : 0));
    return adapter_load(arch, ref, &ret->src, err);
}

void adapter_arg_close(struct adapter_arg *a)
{
    adapter_src_free(a->src);
    *a = (struct adapter_arg){ 0 };
}
