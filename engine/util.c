/* util.c - growing buffers, whole files, hex, the clock. */
#include "engine/util.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <nettle/sha2.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

void buf_init(struct buf *b, size_t max) { *b = (struct buf){ .max = max }; }

void buf_free(struct buf *b)
{
    free(b->data);
    *b = (struct buf){ .max = b->max };
}

int buf_reserve(struct buf *b, size_t more)
{
    if (more > b->max || b->len > b->max - more)
        return ERR_TOO_LARGE;
    size_t need = b->len + more + 1; /* the closing NUL */
    if (need <= b->cap)
        return ERR_OK;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need)
        cap *= 2;
    char *p = realloc(b->data, cap);
    if (p == NULL)
        return ERR_NOMEM;
    b->data = p;
    b->cap = cap;
    return ERR_OK;
}

int buf_add(struct buf *b, const void *data, size_t len)
{
    int rc = buf_reserve(b, len);
    if (rc != ERR_OK)
        return rc;
    if (len > 0)
        memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = '\0';
    return ERR_OK;
}

int buf_puts(struct buf *b, const char *s) { return buf_add(b, s, strlen(s)); }

int buf_printf(struct buf *b, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    int rc = n < 0 ? ERR_INVALID : buf_reserve(b, (size_t)n);
    if (rc == ERR_OK) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
    return rc;
}

char *buf_take(struct buf *b)
{
    char *p = b->data;
    *b = (struct buf){ .max = b->max };
    return p;
}

int file_read(const char *path, size_t max, char **ret, size_t *ret_len, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path,
                       strerror(errno));
    int rc;
    char *data = NULL;
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        rc = err_set(err, ERR_INVALID, "%s: not a regular file", path);
        goto fail;
    }
    if ((uint64_t)st.st_size > max) {
        rc = err_set(err, ERR_TOO_LARGE, "%s: %lld bytes, at most %zu are read", path,
                     (long long)st.st_size, max);
        goto fail;
    }
    size_t size = (size_t)st.st_size, got = 0;
    data = malloc(size + 1);
    if (data == NULL) {
        rc = err_nomem(err);
        goto fail;
    }
    while (got < size) {
        ssize_t n = read(fd, data + got, size - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            rc = err_set(err, ERR_IO, "%s: read stopped after %zu of %zu bytes", path, got, size);
            goto fail;
        }
        got += (size_t)n;
    }
    close(fd);
    data[size] = '\0';
    *ret = data;
    *ret_len = size;
    return ERR_OK;

fail:
    free(data);
    close(fd);
    return rc;
}

int file_map(const char *path, const uint8_t **ret, size_t *ret_len, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path,
                       strerror(errno));
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size == 0) {
        close(fd);
        return err_set(err, ERR_INVALID, "%s: %s", path,
                       S_ISREG(st.st_mode) ? "the file is empty" : "not a regular file");
    }
    size_t len = (size_t)st.st_size;
    void *map = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
    int why = errno;
    close(fd);
    if (map == MAP_FAILED)
        return err_set(err, ERR_IO, "%s: cannot be mapped: %s", path, strerror(why));
    *ret = map;
    *ret_len = len;
    return ERR_OK;
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

int fd_write_all(int fd, const void *data, size_t len, struct err *err)
{
    const char *p = data;
    while (len > 0) {
        ssize_t n = write(fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_UNAVAILABLE : ERR_IO,
                           "cannot write: %s", strerror(errno));
        p += n;
        len -= (size_t)n;
    }
    return ERR_OK;
}

char *path_join(const char *dir, const char *name)
{
    size_t n = strlen(dir);
    const char *sep = n > 0 && dir[n - 1] == '/' ? "" : "/";
    char *p = malloc(n + strlen(sep) + strlen(name) + 1);
    if (p != NULL)
        sprintf(p, "%s%s%s", dir, sep, name);
    return p;
}

/* nettle's header takes this name for a prefixed one of its own. */
#undef sha256_init

_Static_assert(sizeof(struct sha256_ctx) <= sizeof(((struct sha256 *)0)->state),
               "struct sha256 must hold nettle's state");

static struct sha256_ctx *ctx(struct sha256 *h) { return (void *)&h->state; }

void sha256_init(struct sha256 *h) { nettle_sha256_init(ctx(h)); }
void sha256_add(struct sha256 *h, const void *data, size_t len)
{
    nettle_sha256_update(ctx(h), len, data);
}
void sha256_end(struct sha256 *h, uint8_t ret[32]) { nettle_sha256_digest(ctx(h), 32, ret); }

void sha256_of(const void *data, size_t len, uint8_t ret[32])
{
    struct sha256 h;
    sha256_init(&h);
    sha256_add(&h, data, len);
    sha256_end(&h, ret);
}

void hex32(const uint8_t in[32], char ret[65]) { sodium_bin2hex(ret, 65, in, 32); }

bool hex32_parse(const char *hex, uint8_t ret[32])
{
    size_t n = 0;
    return strlen(hex) == 64 && sodium_hex2bin(ret, 32, hex, 64, NULL, &n, NULL) == 0 && n == 32;
}

double now_mono(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int64_t now_unix_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

const char *human_bytes(size_t n, char ret[32])
{
    static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB" };
    double v = (double)n;
    size_t u = 0;
    while (v >= 1024 && u + 1 < sizeof unit / sizeof unit[0]) {
        v /= 1024;
        u++;
    }
    snprintf(ret, 32, u == 0 || v >= 100 ? "%.0f %s" : "%.1f %s", v, unit[u]);
    return ret;
}

int64_t parse_bytes(const char *s)
{
    char *end;
    double v = strtod(s, &end);
    if (end == s || !(v >= 0))
        return -1;
    while (isspace((unsigned char)*end))
        end++;
    int shift = 0;
    if (*end != '\0') {
        static const char order[] = "kmgt";
        const char *p = strchr(order, tolower((unsigned char)*end));
        if (p != NULL) {
            shift = 10 * (int)(p - order + 1);
            end++;
            if (*end == 'i' || *end == 'I')
                end++;
        }
        if (*end == 'b' || *end == 'B')
            end++;
        if (*end != '\0')
            return -1;
    }
    v = ldexp(v, shift);
    return v >= 9e18 ? -1 : (int64_t)v;
}
