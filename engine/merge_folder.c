/* merge_folder.c - the folder around merged weights: config, index, tokenizer, licence. */
#include "engine/merge_int.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEXT_MAX = 64 << 20 };

int merge_folder_make(struct merging *g, const char *out, struct err *err)
{
    struct stat st;
    char *path = strdup(out);
    if (path == NULL)
        return err_nomem(err);
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--)
        path[n - 1] = '\0';
    int rc = ERR_OK;
    if (lstat(path, &st) == 0)
        rc = err_set(err, ERR_CONFLICT, "%s is there already", out);
    else if (asprintf(&g->tmp, "%s.XXXXXX", path) < 0)
        rc = err_nomem(err);
    free(path);
    if (rc != ERR_OK)
        return rc;
    if (mkdtemp(g->tmp) == NULL) {
        rc = err_set(err, ERR_IO, "cannot make a folder beside %s: %s", out, strerror(errno));
        free(g->tmp);
        g->tmp = NULL;
        return rc;
    }
    const mode_t mask = umask(0); /* mkdtemp is for secrets, this is not one */
    umask(mask);
    chmod(g->tmp, 0777 & ~mask);
    return ERR_OK;
}

void merge_folder_remove(struct merging *g)
{
    if (g->tmp == NULL)
        return;
    DIR *d = opendir(g->tmp);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    if (d != NULL)
        closedir(d);
    rmdir(g->tmp);
}

static bool ends_in(const char *name, const char *end)
{
    const size_t n = strlen(name), k = strlen(end);
    return n >= k && strcmp(name + n - k, end) == 0;
}

/* What describes the model and its tokenizer, not other copies of the weights, and no adapter that
 * lay beside them: that one would be added again on loading. */
static bool is_wanted(const struct merging *g, const char *name)
{
    static const char *const ends[] = { ".json", ".jinja", ".model", ".txt", ".tiktoken" };
    if (name[0] == '.' || strcmp(name, "adapter_config.json") == 0)
        return false;
    if (strncmp(name, "LICENSE", 7) == 0 || strncmp(name, "NOTICE", 6) == 0)
        return true;
    if (ends_in(name, ".index.json"))
        return source_text(&g->src, name) != NULL; /* the one that was read */
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++)
        if (ends_in(name, ends[i]))
            return true;
    return false;
}

static int write_text(const struct merging *g, const char *name, const char *text, size_t len,
                      struct err *err)
{
    char *path = path_join(g->tmp, name);
    if (path == NULL)
        return err_nomem(err);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    int rc = fd < 0 ? err_set(err, ERR_IO, "%s: %s", path, strerror(errno))
                    : fd_write_all(fd, text, len, err);
    if (rc == ERR_OK && fsync(fd) != 0)
        rc = err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    free(path);
    return rc;
}

/* Both spellings of the type in config.json; NULL when memory is out. */
static char *with_dtype(const struct merging *g, const char *text, size_t len)
{
    const char *const name = g->dtype == DT_F32 ? "float32" : g->dtype == DT_F16 ? "float16" : "bfloat16";
    json_t *j = json_loadb(text, len, 0, NULL);
    const bool new_spelling = json_object_get(j, "dtype") != NULL;
    if (new_spelling)
        json_object_set_new(j, "dtype", json_string(name));
    if (!new_spelling || json_object_get(j, "torch_dtype") != NULL)
        json_object_set_new(j, "torch_dtype", json_string(name));
    char *ret = json_dumps(j, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
    json_decref(j);
    return ret;
}

static char *with_size(const struct merging *g, const char *text, size_t len)
{
    json_t *j = json_loadb(text, len, 0, NULL);
    json_t *meta = json_object_get(j, "metadata");
    if (json_is_object(meta) && json_object_get(meta, "total_size") != NULL)
        json_object_set_new(meta, "total_size", json_integer((json_int_t)g->total));
    char *ret = json_dumps(j, JSON_INDENT(2));
    json_decref(j);
    return ret;
}

static int copy_file(const struct merging *g, const char *name, struct err *err)
{
    char *path = path_join(g->src.dir, name), *text = NULL, *changed = NULL;
    size_t len = 0;
    struct stat st;
    int rc = path == NULL ? err_nomem(err) : ERR_OK;
    if (rc == ERR_OK && (stat(path, &st) != 0 || !S_ISREG(st.st_mode))) {
        free(path);
        return ERR_OK;
    }
    if (rc == ERR_OK)
        rc = file_read(path, TEXT_MAX, &text, &len, err);
    free(path);
    const bool config = strcmp(name, "config.json") == 0, index = ends_in(name, ".index.json");
    if (rc == ERR_OK && g->dtype != DT_OTHER && (config || index)) {
        changed = config ? with_dtype(g, text, len) : with_size(g, text, len);
        if (changed == NULL)
            rc = err_nomem(err);
    }
    if (rc == ERR_OK)
        rc = changed != NULL ? write_text(g, name, changed, strlen(changed), err)
                             : write_text(g, name, text, len, err);
    free(text);
    free(changed);
    return rc;
}

int merge_copy_files(struct merging *g, struct err *err)
{
    DIR *d = opendir(g->src.dir);
    if (d == NULL)
        return err_set(err, ERR_IO, "%s: %s", g->src.dir, strerror(errno));
    int rc = ERR_OK;
    for (struct dirent *e; rc == ERR_OK && (e = readdir(d)) != NULL;)
        if (is_wanted(g, e->d_name))
            rc = copy_file(g, e->d_name, err);
    closedir(d);
    return rc;
}
