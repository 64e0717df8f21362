/* upload.c - adapters coming in: a form with PEFT's two files, a tar of its folder, or a GGUF file.
 *
 * The bytes lie in a spool file when a handler starts.  They are checked against the base that
 * runs (peft_parse refuses what it would not use), and only then written, in one transaction. */
#include "api/api_int.h"
#include "engine/gguf.h"
#include "engine/torch_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What was sent. */
struct upload {
    const char *name;
    const char *config; /* NULL with GGUF */
    size_t config_len;
    struct spool *weights;
    bool activate;
};

/* (Not st_open(): its messages name the path, which is ours.) */
int spool_map(struct spool *s, const char *param, const char *what, void **ret, size_t *ret_len,
              struct err *err)
{
    const char *path;
    int rc = spool_done(s, &path, err);
    if (rc != ERR_OK)
        return rc;
    const size_t len = spool_size(s);
    if (len == 0)
        return err_set_slug(err, ERR_INVALID, NULL, param, "%s", what);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    void *p = fd < 0 ? MAP_FAILED : mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
    const int why = errno;
    if (fd >= 0)
        close(fd);
    if (p == MAP_FAILED)
        return err_set(err, ERR_IO, "%s: %s", path, strerror(why));
    *ret = p;
    *ret_len = len;
    return ERR_OK;
}

/* GGUF brings no config, everything else needs one. */
static int parse(struct api_ctx *c, const struct upload *u, const void *data, size_t len,
                 struct st_file **ret_weights, struct adapter_src **ret, struct err *err)
{
    const struct arch *arch = &c->api->o.base->arch;
    if (u->config == NULL)
        return peft_gguf_parse(arch, data, len, "the weights", ret, err);
    int rc = weights_open_mem(data, len, "the weights", ret_weights, err);
    return rc == ERR_OK ? peft_parse(arch, u->config, u->config_len, *ret_weights, ret, err) : rc;
}

static int put(struct api_ctx *c, const struct upload *u, const void *data, size_t len,
               struct store_version *ret, bool *ret_new, struct err *err)
{
    struct adapter_src *src = NULL;
    struct st_file *weights = NULL; /* src may point into it */
    int rc = parse(c, u, data, len, &weights, &src, err);
    /* The shapes fit; that it was trained on this base is the uploader's word. */
    const struct store_put_opts o = { .activate = u->activate,
                                      .base_hash_hex = c->api->o.base->hash_hex,
                                      .base_claimed = true, .origin = "upload" };
    if (rc == ERR_OK)
        rc = store_adapter_put(c->st, c->plan->tenant, u->name, src, &o, ret, ret_new, err);
    adapter_src_free(src);
    st_close(weights);
    return rc;
}

enum { P_NAME, P_CONFIG, P_WEIGHTS, P_ACTIVATE, P_COUNT };
static const char *const part_names[P_COUNT] = { "name", "config", "weights", "activate" };

static int no_part(int k, struct err *err)
{
    static const char *const how[P_ACTIVATE] = {
        "-F name=NAME", "-F config=@adapter_config.json", "-F weights=@adapter_model.safetensors"
    };
    return err_set_slug(err, ERR_INVALID, NULL, part_names[k], "the form has no part `%s` (curl %s)",
                        part_names[k], how[k]);
}

static int finish(struct api_ctx *c, const struct upload *u, struct err *err)
{
    int rc = store_name_check("an adapter", u->name, err);
    if (rc != ERR_OK)
        return rc;
    if (is_base_name(c->api, u->name))
        return err_set_slug(err, ERR_CONFLICT, NULL, "name",
                            "%s is the name of the base: an adapter needs another", u->name);
    void *map = NULL;
    size_t len = 0;
    rc = spool_map(u->weights, "weights", "the weights are empty", &map, &len, err);
    if (rc != ERR_OK)
        return rc;
    struct store_version v = { 0 };
    bool is_new = false;
    if (u->config == NULL && !gguf_is(map, len))
        rc = no_part(P_CONFIG, err);
    else
        rc = put(c, u, map, len, &v, &is_new, err);
    munmap(map, len);
    if (rc != ERR_OK)
        return rc;
    api_resp_header(c->resp, "Location", "/v1/adapters/%s@%d", v.name, v.version);
    json_t *j = version_json(c->api, &v);
    store_version_free(&v);
    return resp_json(c, is_new ? 201 : 200, j, err);
}

static int parse_activate(const char *text, bool *ret, struct err *err)
{
    if (text == NULL || strcmp(text, "true") == 0 || strcmp(text, "1") == 0)
        *ret = true;
    else if (strcmp(text, "false") == 0 || strcmp(text, "0") == 0)
        *ret = false;
    else
        return err_set_slug(err, ERR_INVALID, NULL, "activate",
                            "`activate` must be true or false, not \"%.40s\"", text);
    return ERR_OK;
}

int form_parts(const struct api_req *req, int n, const char *const names[], const char *takes,
               const struct api_part *part[], struct err *err)
{
    for (size_t i = 0; i < req->nparts; i++) {
        int k = 0;
        while (k < n && strcmp(names[k], req->parts[i].name) != 0)
            k++;
        if (k == n)
            return err_set(err, ERR_INVALID, "the form has an unknown part `%.80s`: it takes %s",
                           req->parts[i].name, takes);
        if (part[k] != NULL)
            return err_set_slug(err, ERR_INVALID, NULL, names[k],
                                "the form has more than one part `%s`", names[k]);
        part[k] = &req->parts[i];
    }
    return ERR_OK;
}

/* --- POST /v1/adapters -F name=NAME -F config=@adapter_config.json
 *                        -F weights=@adapter_model.safetensors [-F activate=false]; with GGUF weights
 *                        no config --------------------------------------------------------------- */

static int sort_parts(const struct api_req *req, const struct api_part *part[P_COUNT],
                      struct err *err)
{
    int rc = form_parts(req, P_COUNT, part_names, "name, config, weights and activate", part, err);
    if (rc != ERR_OK)
        return rc;
    if (part[P_NAME] == NULL)
        return no_part(P_NAME, err);
    if (part[P_WEIGHTS] == NULL)
        return no_part(part[P_CONFIG] == NULL ? P_CONFIG : P_WEIGHTS, err);
    return ERR_OK;
}

int adapters_create(struct api_ctx *c, struct err *err)
{
    const struct api_part *part[P_COUNT] = { NULL };
    struct upload u = { 0 };
    int rc = sort_parts(c->req, part, err);
    if (rc == ERR_OK)
        rc = parse_activate(part[P_ACTIVATE] ? part[P_ACTIVATE]->value : NULL, &u.activate, err);
    if (rc != ERR_OK || part[P_NAME] == NULL || part[P_WEIGHTS] == NULL)
        return rc;
    if (strlen(part[P_NAME]->value) != part[P_NAME]->len)
        return err_set_slug(err, ERR_INVALID, NULL, "name", "`name` must not contain NUL");
    if (part[P_CONFIG] != NULL && part[P_CONFIG]->len == 0)
        return err_set_slug(err, ERR_INVALID, NULL, "config", "adapter_config.json is empty");
    u.name = part[P_NAME]->value;
    if (part[P_CONFIG] != NULL) {
        u.config = part[P_CONFIG]->value;
        u.config_len = part[P_CONFIG]->len;
    }
    u.weights = part[P_WEIGHTS]->spool;
    return finish(c, &u, err);
}

/* --- PUT /v1/adapters/NAME[?activate=false], curl -T adapter.tar or adapter.gguf ------------------ */

static bool file_is_gguf(const char *path)
{
    char head[4];
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const bool yes = fd >= 0 && read(fd, head, sizeof head) == (ssize_t)sizeof head &&
                     gguf_is(head, sizeof head);
    if (fd >= 0)
        close(fd);
    return yes;
}

int adapters_put(struct api_ctx *c, struct err *err)
{
    char name[STORE_NAME_MAX + 1];
    int version;
    struct upload u = { .name = name };
    struct tar_adapter tar = { 0 };
    const char *path;
    int rc = ref_parse(c, c->plan->arg, name, &version, err);
    if (rc == ERR_OK && version != 0)
        rc = err_set(err, ERR_INVALID, "versions are numbered here: PUT /v1/adapters/%s", name);
    if (rc == ERR_OK)
        rc = parse_activate(c->req->query(c->req->ud, "activate"), &u.activate, err);
    if (rc == ERR_OK && (c->req->upload == NULL || spool_size(c->req->upload) == 0))
        rc = err_set(err, ERR_INVALID, "the body is empty: send a tar file with "
                     "adapter_config.json and adapter_model.safetensors, or a GGUF file");
    if (rc == ERR_OK)
        rc = spool_done(c->req->upload, &path, err);
    if (rc == ERR_OK && file_is_gguf(path)) {
        u.weights = c->req->upload;
        return finish(c, &u, err);
    }
    if (rc == ERR_OK)
        rc = tar_read_adapter(path, c->api->o.db_path, c->api->o.max_adapter_bytes, &tar, err);
    if (rc != ERR_OK)
        return rc;
    u.config = tar.config;
    u.config_len = tar.config_len;
    u.weights = tar.weights;
    rc = finish(c, &u, err);
    tar_adapter_free(&tar);
    return rc;
}
