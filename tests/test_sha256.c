/* test_sha256.c - SHA-256 against the standard's examples and against libsodium. */
#include "engine/util.h"

#include <setjmp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* FIPS 180-4's examples, and the long one of NIST's list. */
static void the_standards_examples(void **state)
{
    (void)state;
    const struct { const char *text; size_t times; const char *hex; } cases[] = {
        { "", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
        { "abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
        { "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" },
        { "aaaaaaaaaa", 100000,
          "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct sha256 h;
        uint8_t got[32];
        char hex[65];
        sha256_init(&h);
        for (size_t k = 0; k < cases[i].times; k++)
            sha256_add(&h, cases[i].text, strlen(cases[i].text));
        sha256_end(&h, got);
        hex32(got, hex);
        assert_string_equal(hex, cases[i].hex);
    }
}

static void every_length_and_cut_agrees_with_libsodium(void **state)
{
    (void)state;
    uint8_t data[1024], want[32], got[32];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 167 + (i >> 3));
    for (size_t len = 0; len <= 300; len++) {
        crypto_hash_sha256(want, data, len);
        sha256_of(data, len, got);
        assert_memory_equal(got, want, 32);
    }
    for (size_t a = 0; a <= 130; a++) {
        for (size_t b = a; b <= sizeof data; b += 61) {
            struct sha256 h;
            sha256_init(&h);
            sha256_add(&h, data, a);
            sha256_add(&h, data + a, b - a);
            sha256_add(&h, data + b, sizeof data - b);
            sha256_end(&h, got);
            crypto_hash_sha256(want, data, sizeof data);
            assert_memory_equal(got, want, 32);
        }
    }
}

int main(void)
{
    if (sodium_init() < 0)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_standards_examples),
        cmocka_unit_test(every_length_and_cut_agrees_with_libsodium),
    };
    return cmocka_run_group_tests_name("sha256", tests, NULL, NULL);
}
