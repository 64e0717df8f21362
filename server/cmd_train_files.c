/* cmd_train_files.c - the folder and the state file of a run. */
#include "server/cmd_train.h"

#include "engine/util.h"
#include "server/cmd_adapter.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STATE_MAGIC "lorad run 1\n"
enum { HEAD = sizeof STATE_MAGIC - 1 + sizeof(int64_t) };
#define STATE_MAX ((size_t)1 << 40)

static int io_error(const char *path, struct err *err)
{
    return err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_UNAVAILABLE : ERR_IO, "%s: %s",
                   path, strerror(errno));
}

static char *with_suffix(const char *path, const char *suffix)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    char *s = NULL;
    return asprintf(&s, "%.*s%s", (int)n, path, suffix) < 0 ? NULL : s;
}

/* --- opening --------------------------------------------------------------------------------------- */
/* rename() takes the place of an empty folder and of nothing else: so the same is asked here, before the
 * work. */
static int check_out(const char *out, struct err *err)
{
    struct stat sb;
    if (lstat(out, &sb) != 0)
        return errno == ENOENT ? ERR_OK : io_error(out, err);
    DIR *dir = S_ISDIR(sb.st_mode) ? opendir(out) : NULL;
    int entries = dir == NULL ? 3 : 0;
    while (dir != NULL && entries < 3 && readdir(dir) != NULL)
        entries++; /* "." and ".." are two */
    if (dir != NULL)
        closedir(dir);
    if (entries < 3)
        return ERR_OK;
    return err_set(err, ERR_CONFLICT, "%s is there already, and is not an empty folder", out);
}

int train_files_open(struct train_files *f, const char *out, const char *state, const char *name,
                     struct err *err)
{
    *f = (struct train_files){ 0 };
    int rc = out != NULL ? check_out(out, err) : ERR_OK;
    if (rc != ERR_OK)
        return rc;
    f->out = out != NULL ? with_suffix(out, "") : NULL;
    f->partial = out != NULL ? with_suffix(out, ".partial") : NULL;
    f->state = state != NULL ? strdup(state)
                             : with_suffix(out != NULL ? out : name != NULL ? name : "lorad", ".state");
    if (f->state == NULL || (out != NULL && (f->out == NULL || f->partial == NULL))) {
        train_files_close(f);
        return err_nomem(err);
    }
    return ERR_OK;
}

void train_files_close(struct train_files *f)
{
    if (f->metrics != NULL)
        fclose(f->metrics);
    free(f->out);
    free(f->partial);
    free(f->state);
    *f = (struct train_files){ 0 };
}

/* --- state ------------------------------------------------------------------------------------------ */
int train_files_state(const struct train_files *f, char **ret, size_t *ret_at, size_t *ret_len,
                      int64_t *ret_now, struct err *err)
{
    char *data;
    size_t len;
    if (!file_exists(f->state))
        return err_set(err, ERR_NOT_FOUND, "there is no state %s to go on from", f->state);
    int rc = file_read(f->state, STATE_MAX, &data, &len, err);
    if (rc != ERR_OK)
        return rc;
    if (len < HEAD || memcmp(data, STATE_MAGIC, sizeof STATE_MAGIC - 1) != 0) {
        free(data);
        return err_set(err, ERR_INVALID, "%s is not the state of a run", f->state);
    }
    memcpy(ret_now, data + sizeof STATE_MAGIC - 1, sizeof *ret_now);
    *ret = data;
    *ret_at = HEAD;
    *ret_len = len - HEAD;
    return ERR_OK;
}

/* All of it on the disk under `path`, or nothing. */
static int write_whole(const char *path, mode_t mode, const void *data, size_t len,
                       struct err *err)
{
    char *tmp = with_suffix(path, ".tmp");
    if (tmp == NULL)
        return err_nomem(err);
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    int rc = fd < 0 ? io_error(tmp, err) : fd_write_all(fd, data, len, err);
    if (rc == ERR_OK && fsync(fd) != 0)
        rc = io_error(tmp, err);
    if (fd >= 0 && close(fd) != 0 && rc == ERR_OK)
        rc = io_error(tmp, err);
    if (rc == ERR_OK && rename(tmp, path) != 0)
        rc = io_error(path, err);
    if (rc != ERR_OK)
        unlink(tmp);
    free(tmp);
    return rc;
}

int train_files_save(const struct train_files *f, const struct train *t, int64_t now,
                     struct err *err)
{
    struct buf b;
    buf_init(&b, STATE_MAX);
    int rc = buf_add(&b, STATE_MAGIC, sizeof STATE_MAGIC - 1);
    if (rc == ERR_OK)
        rc = buf_add(&b, &now, sizeof now);
    if (rc == ERR_OK)
        rc = train_save(t, &b, err);
    else
        rc = err_nomem(err);
    if (rc == ERR_OK)
        rc = write_whole(f->state, 0600, b.data, b.len, err);
    buf_free(&b);
    return rc;
}

void train_files_forget(const struct train_files *f) { unlink(f->state); }

/* --- the folder ------------------------------------------------------------------------------------- */
/* The lines of steps 1..step: a run that goes on computes the others again. */
static int copy_metrics(const char *path, int64_t step, struct buf *ret, struct err *err)
{
    char *data = NULL;
    size_t len = 0;
    if (step == 0 || !file_exists(path))
        return ERR_OK;
    int rc = file_read(path, (size_t)1 << 32, &data, &len, err);
    for (char *line = data, *end; rc == ERR_OK && line != NULL; line = end + 1) {
        end = strchr(line, '\n');
        if (end == NULL)
            break;
        json_t *j = json_loadb(line, (size_t)(end - line), 0, NULL);
        const bool keep = j != NULL && json_integer_value(json_object_get(j, "step")) <= step;
        json_decref(j);
        if (keep && buf_add(ret, line, (size_t)(end + 1 - line)) != ERR_OK)
            rc = err_nomem(err);
    }
    free(data);
    return rc;
}

int train_files_begin(struct train_files *f, int64_t step, struct err *err)
{
    struct buf before;
    if (f->out == NULL)
        return ERR_OK;
    if (mkdir(f->partial, 0777) != 0 && errno != EEXIST)
        return io_error(f->partial, err);
    char *path = path_join(f->partial, "metrics.jsonl");
    if (path == NULL)
        return err_nomem(err);
    buf_init(&before, (size_t)1 << 32);
    int rc = copy_metrics(path, step, &before, err);
    if (rc == ERR_OK)
        rc = write_whole(path, 0666, before.data != NULL ? before.data : "", before.len, err);
    if (rc == ERR_OK && (f->metrics = fopen(path, "ae")) == NULL)
        rc = io_error(path, err);
    buf_free(&before);
    free(path);
    return rc;
}

int train_files_metric(struct train_files *f, const json_t *line, struct err *err)
{
    if (f->metrics == NULL)
        return ERR_OK;
    if (json_dumpf(line, f->metrics, JSON_COMPACT | JSON_REAL_PRECISION(9)) != 0 ||
        fputc('\n', f->metrics) == EOF || fflush(f->metrics) != 0)
        return io_error(f->partial, err);
    return ERR_OK;
}

/* What a run that was cut off just here may have left. */
static void remove_adapter(const char *dir)
{
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors" };
    for (int i = 0; i < 2; i++) {
        char *path = path_join(dir, names[i]);
        if (path != NULL)
            unlink(path);
        free(path);
    }
}

int train_files_finish(struct train_files *f, const struct adapter_src *a, struct err *err)
{
    if (f->out == NULL)
        return ERR_OK;
    int rc = ERR_OK;
    if (f->metrics != NULL && (fflush(f->metrics) != 0 || fsync(fileno(f->metrics)) != 0))
        rc = io_error(f->partial, err);
    remove_adapter(f->partial);
    if (rc == ERR_OK)
        rc = adapter_write_folder(a, f->partial, err);
    if (rc == ERR_OK && rename(f->partial, f->out) != 0)
        rc = io_error(f->out, err);
    return rc;
}
