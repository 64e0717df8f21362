/* fuzz.h - what the fuzz targets (fuzz_*.c) share.
 *
 * Each target is one program around LLVMFuzzerTestOneInput(), built with clang's libFuzzer,
 * AddressSanitizer and UBSan by `make fuzz`; tools/fuzz.sh runs them.  A target feeds bytes to one
 * parser and, where there is one, checks a law that must hold for whatever it accepts: law()
 * aborts, which the fuzzer reports like a crash.  Seeds lie in tests/corpus/NAME. */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

/* `why` is seen in the stack trace and in a debugger. */
static inline void law(bool holds, const char *why)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz: %s\n", why);
    abort();
}

/* The bytes as a file for parsers that take a path; close() *ret_fd. */
struct fuzz_file {
    int fd;
    char path[40];
};

static inline struct fuzz_file fuzz_file(const void *data, size_t len)
{
    struct fuzz_file f = { .fd = memfd_create("fuzz", MFD_CLOEXEC) };
    law(f.fd >= 0, "memfd_create");
    for (size_t done = 0; done < len;) {
        const ssize_t n = write(f.fd, (const char *)data + done, len - done);
        law(n > 0, "write to a memfd");
        done += (size_t)n;
    }
    snprintf(f.path, sizeof f.path, "/proc/self/fd/%d", f.fd);
    return f;
}

/* A copy with a NUL behind it, exactly as long, so that reading past its end is seen; free() it. */
static inline char *fuzz_text(const void *data, size_t len)
{
    char *s = malloc(len + 1);
    law(s != NULL, "memory");
    if (len > 0)
        memcpy(s, data, len);
    s[len] = '\0';
    return s;
}

/* Inputs of two parts are cut at the first NUL: both are its length and what follows it. */
static inline size_t fuzz_cut(const uint8_t *data, size_t len)
{
    const uint8_t *nul = len > 0 ? memchr(data, 0, len) : NULL;
    return nul != NULL ? (size_t)(nul - data) : len;
}

#endif
