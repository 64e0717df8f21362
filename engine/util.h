/* util.h - small things that every folder needs: growing buffers with a mandatory
 * maximum, whole files, SHA-256, the clock.
 *
 * Any thread may call any of it; a `struct buf` belongs to one thread at a time. */
#ifndef ENGINE_UTIL_H
#define ENGINE_UTIL_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- growing buffers --------------------------------------------------------
 * `data` is always followed by a NUL once anything was added, so text can be
 * used as a string.  Nothing grows past `max` bytes. */
struct buf {
    char *data; /* NULL while empty */
    size_t len, cap, max;
};

void buf_init(struct buf *b, size_t max);
void buf_free(struct buf *b);
/* 0, ERR_NOMEM, or ERR_TOO_LARGE when `max` would be passed (b is unchanged). */
int buf_add(struct buf *b, const void *data, size_t len);
/* Room for `more` bytes, so that adding them allocates nothing. */
int buf_reserve(struct buf *b, size_t more);
int buf_puts(struct buf *b, const char *s);
int buf_printf(struct buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Take the memory out (free() it); the buffer is empty afterwards. */
char *buf_take(struct buf *b);

/* --- files ------------------------------------------------------------------ */
/* Read a whole file of at most `max` bytes; *ret is the caller's, NUL-terminated. */
int file_read(const char *path, size_t max, char **ret, size_t *ret_len, struct err *err);
/* Map a regular file that is not empty, read-only; munmap() it. */
int file_map(const char *path, const uint8_t **ret, size_t *ret_len, struct err *err);
bool file_exists(const char *path);
/* Write all of it or fail: loops over short writes and EINTR. */
int fd_write_all(int fd, const void *data, size_t len, struct err *err);
/* "a/b" from "a" and "b"; free() it.  NULL when memory is out. */
char *path_join(const char *dir, const char *name);

/* --- SHA-256 (nettle, which uses the CPU's SHA instructions) ----------------- */
struct sha256 {
    _Alignas(16) unsigned char state[128]; /* nettle's struct sha256_ctx */
};
void sha256_init(struct sha256 *h);
void sha256_add(struct sha256 *h, const void *data, size_t len);
void sha256_end(struct sha256 *h, uint8_t ret[32]);
void sha256_of(const void *data, size_t len, uint8_t ret[32]);
/* 64 lower-case digits and a NUL. */
void hex32(const uint8_t in[32], char ret[65]);
/* 64 hex digits to 32 bytes; false if it is not that. */
bool hex32_parse(const char *hex, uint8_t ret[32]);

/* --- time ------------------------------------------------------------------- */
double now_mono(void);      /* seconds since some start; never goes back */
int64_t now_unix_ms(void);  /* wall clock, milliseconds since 1970 */

/* "1.5 GiB", "320 MiB", "12 B": for people. */
const char *human_bytes(size_t n, char ret[32]);
/* "8G", "512M", "1.5GiB", "4096": bytes; -1 if it is not a size. */
int64_t parse_bytes(const char *s);

#endif
