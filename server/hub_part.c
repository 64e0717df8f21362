/* hub_part.c - a file being downloaded: NAME.part until it is whole and its hash is right. */
#include "server/hub_int.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static void part_name(const struct hub_file *f, char ret[HUB_NAME_MAX + 6])
{
    snprintf(ret, HUB_NAME_MAX + 6, "%s.part", f->name);
}

/* Names in the cache are given only after the hash was right. */
bool part_is_done(int dir, const struct hub_file *f)
{
    struct stat st;
    return fstatat(dir, f->name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode) &&
           (uint64_t)st.st_size == f->size;
}

static void hash_begin(struct part *p)
{
    char head[32];
    const int n = snprintf(head, sizeof head, "blob %llu", (unsigned long long)p->file->size);
    p->at = 0;
    sha256_init(&p->sha256);
    sha1_init(&p->sha1);
    sha1_update(&p->sha1, (size_t)n + 1, (const uint8_t *)head);
}

static void hash_add(struct part *p, const void *data, size_t len)
{
    if (p->file->lfs)
        sha256_add(&p->sha256, data, len);
    else
        sha1_update(&p->sha1, len, data);
    p->at += len;
}

static int io_error(const struct part *p, const char *doing, struct err *err)
{
    if (errno == ENOSPC || errno == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE,
                       "the disk is full: %s.part stays in the cache, and the next try goes on there",
                       p->file->name);
    return err_set(err, ERR_IO, "cannot %s %s.part in the cache: %s", doing, p->file->name,
                   strerror(errno));
}

/* What an earlier run left goes into the hash. */
static int read_old(struct part *p, struct err *err)
{
    enum { STEP = 1 << 20 };
    char *buf = malloc(STEP);
    ssize_t n = 0;
    if (buf == NULL)
        return err_nomem(err);
    while ((n = read(p->fd, buf, STEP)) > 0)
        hash_add(p, buf, (size_t)n);
    free(buf);
    return n < 0 ? io_error(p, "read", err) : ERR_OK;
}

int part_open(struct part *p, int dir, const struct hub_file *f, struct err *err)
{
    char name[HUB_NAME_MAX + 6];
    struct stat st;
    part_name(f, name);
    *p = (struct part){ .file = f, .dir = dir };
    p->fd = openat(dir, name, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    if (p->fd < 0)
        return io_error(p, "open", err);
    if (fstat(p->fd, &st) != 0 || !S_ISREG(st.st_mode))
        return err_set(err, ERR_IO, "%s in the cache is not a plain file", name);
    if (flock(p->fd, LOCK_EX | LOCK_NB) != 0)
        return err_set(err, ERR_BUSY, "another program is downloading %s", f->name);
    hash_begin(p);
    if ((uint64_t)st.st_size > f->size)
        return part_restart(p, err);
    p->resumed = st.st_size > 0;
    return read_old(p, err);
}

int part_restart(struct part *p, struct err *err)
{
    hash_begin(p);
    p->resumed = false;
    if (ftruncate(p->fd, 0) != 0 || lseek(p->fd, 0, SEEK_SET) < 0)
        return io_error(p, "empty", err);
    return ERR_OK;
}

int part_write(struct part *p, const void *data, size_t len, struct err *err)
{
    if (len > p->file->size - p->at)
        return err_set(err, ERR_INVALID, "%s: more bytes came than the %llu that the hub's list says",
                       p->file->name, (unsigned long long)p->file->size);
    for (size_t done = 0; done < len;) {
        const ssize_t n = write(p->fd, (const char *)data + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(p, "write", err);
        hash_add(p, (const char *)data + done, (size_t)n);
        done += (size_t)n;
    }
    return ERR_OK;
}

static bool hash_is_right(struct part *p)
{
    uint8_t digest[32];
    if (p->file->lfs) {
        sha256_end(&p->sha256, digest);
        return memcmp(digest, p->file->sha256, 32) == 0;
    }
    sha1_digest(&p->sha1, SHA1_DIGEST_SIZE, digest);
    return memcmp(digest, p->file->sha1, SHA1_DIGEST_SIZE) == 0;
}

int part_finish(struct part *p, bool *ret_again, struct err *err)
{
    char name[HUB_NAME_MAX + 6];
    part_name(p->file, name);
    *ret_again = false;
    if (!hash_is_right(p)) {
        *ret_again = p->resumed;
        if (p->resumed)
            return part_restart(p, err);
        unlinkat(p->dir, name, 0);
        return err_set(err, ERR_INVALID,
                       "%s: the bytes that came have another %s than the hub's list says; the file was "
                       "removed", p->file->name, p->file->lfs ? "sha256" : "git hash");
    }
    if (fsync(p->fd) != 0)
        return io_error(p, "write", err);
    if (renameat(p->dir, name, p->dir, p->file->name) != 0)
        return io_error(p, "rename", err);
    return ERR_OK;
}

void part_close(struct part *p)
{
    if (p->fd > 0)
        close(p->fd);
    p->fd = -1;
}
