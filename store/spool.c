/* spool.c - bounded temporary files for uploads.
 *
 * Each file is locked (flock) as long as its spool is open, so that cleaning up after a killed
 * process never takes a file that is in use, also by another server on the same database. */
#include "store/store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include "engine/util.h"

struct spool {
    int fd;
    char *path;
    size_t size, max;
    bool done;
};

/* The folder of a database's spool, or NULL when memory is out. */
static char *spool_folder(const char *db_path)
{
    char *folder = NULL;
    return asprintf(&folder, "%s.spool", db_path) < 0 ? NULL : folder;
}

/* It must be a folder of ours that nobody else can look into. */
static int make_folder(const char *folder, struct err *err)
{
    struct stat sb;
    if (mkdir(folder, 0700) == 0)
        return ERR_OK;
    if (errno != EEXIST || lstat(folder, &sb) != 0)
        return err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_UNAVAILABLE : ERR_IO,
                       "cannot make the folder for uploads, %s: %s", folder, strerror(errno));
    if (!S_ISDIR(sb.st_mode))
        return err_set(err, ERR_IO, "%s is in the way: uploads need a folder of that name", folder);
    if ((sb.st_mode & 077) != 0 && chmod(folder, 0700) != 0)
        return err_set(err, ERR_IO, "the folder for uploads, %s, is open to others: %s", folder,
                       strerror(errno));
    return ERR_OK;
}

/* Remove the file unless somebody has it open as a spool. */
static void clean_one(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        unlinkat(dir, name, 0);
    close(fd);
}

int spool_clean(const char *db_path, struct err *err)
{
    if (strcmp(db_path, ":memory:") == 0)
        return ERR_OK;
    char *folder = spool_folder(db_path);
    if (folder == NULL)
        return err_nomem(err);
    int rc = ERR_OK;
    DIR *d = opendir(folder);
    if (d == NULL && errno != ENOENT)
        rc = err_set(err, ERR_IO, "cannot clean the folder for uploads, %s: %s", folder,
                     strerror(errno));
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.')
            clean_one(dirfd(d), e->d_name);
    if (d != NULL)
        closedir(d);
    free(folder);
    return rc;
}

/* A template for mkostemp(). */
static char *spool_template(const char *db_path, struct err *err)
{
    char *path = NULL;
    if (strcmp(db_path, ":memory:") == 0) {
        const char *tmp = getenv("TMPDIR");
        if (asprintf(&path, "%s/lorad-spool-XXXXXX", tmp != NULL && tmp[0] ? tmp : "/tmp") < 0)
            path = NULL;
        if (path == NULL)
            err_nomem(err);
        return path;
    }
    char *folder = spool_folder(db_path);
    if (folder == NULL) {
        err_nomem(err);
        return NULL;
    }
    if (make_folder(folder, err) == ERR_OK && (path = path_join(folder, "XXXXXX")) == NULL)
        err_nomem(err);
    free(folder);
    return path;
}

/* One more try is needed when spool_clean() took the file before it was locked. */
static int open_locked(struct spool *s, struct err *err)
{
    const size_t tail = strlen(s->path) - 6;
    for (;;) {
        memcpy(s->path + tail, "XXXXXX", 6);
        s->fd = mkostemp(s->path, O_CLOEXEC);
        if (s->fd < 0)
            return err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_UNAVAILABLE : ERR_IO,
                           "cannot make a file for an upload, %s: %s", s->path, strerror(errno));
        struct stat sb;
        if (flock(s->fd, LOCK_EX) != 0 || fstat(s->fd, &sb) != 0) {
            int rc = err_set(err, ERR_IO, "cannot lock the file for an upload, %s: %s", s->path,
                             strerror(errno));
            unlink(s->path);
            close(s->fd);
            return rc;
        }
        if (sb.st_nlink > 0)
            return ERR_OK;
        close(s->fd);
    }
}

int spool_open(const char *db_path, size_t max, struct spool **ret, struct err *err)
{
    struct err why = { .code = ERR_OK };
    if (err == NULL)
        err = &why;
    struct spool *s = calloc(1, sizeof *s);
    if (s == NULL)
        return err_nomem(err);
    s->fd = -1;
    s->max = max;
    s->path = spool_template(db_path, err);
    int rc = s->path == NULL ? (int)err->code : open_locked(s, err);
    if (rc != ERR_OK) {
        free(s->path);
        free(s);
        return rc;
    }
    *ret = s;
    return ERR_OK;
}

int spool_write(struct spool *s, const void *data, size_t len, struct err *err)
{
    if (s->done)
        return err_set(err, ERR_INTERNAL, "an upload was written to after its end");
    if (len > s->max - s->size) {
        char limit[32];
        return err_set(err, ERR_TOO_LARGE, "the upload is larger than %s",
                       human_bytes(s->max, limit));
    }
    struct err why = { .code = ERR_OK };
    int rc = fd_write_all(s->fd, data, len, &why);
    if (rc == ERR_UNAVAILABLE)
        return err_set(err, rc, "the disk is full: the upload could not be kept");
    if (rc != ERR_OK)
        return err_set(err, rc, "the upload could not be kept: %s", why.msg);
    s->size += len;
    return ERR_OK;
}

int spool_done(struct spool *s, const char **ret_path, struct err *err)
{
    (void)err;
    s->done = true;
    *ret_path = s->path;
    return ERR_OK;
}

size_t spool_size(const struct spool *s) { return s->size; }

void spool_close(struct spool *s)
{
    if (s == NULL)
        return;
    unlink(s->path);
    close(s->fd);
    free(s->path);
    free(s);
}
