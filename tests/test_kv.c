/* test_kv.c - pages are shared by whoever would compute the same bytes, recycled oldest first,
 * and never lost. */
#include "engine/kv.h"
#include "tests/support_mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const struct arch shape = { .L = 3, .G = 2, .hd = 8, .H = 4, .D = 32, .V = 100 };
static const uint8_t seed_a[32] = { 1 }, seed_b[32] = { 2 };

static struct kv_cache *make(int pages)
{
    struct kv_cache *c;
    struct err err = { 0 };
    size_t bytes = (size_t)pages * kv_page_bytes(&shape, KV_F16);
    assert_int_equal(kv_create(&shape, KV_F16, bytes + 5, &c, &err), ERR_OK);
    assert_int_equal(kv_pages(c), pages);
    return c;
}

/* Tokens start, start + 1, ... */
static void count_up(int32_t *t, int n, int start)
{
    for (int i = 0; i < n; i++)
        t[i] = start + i;
}

static struct kv_seq compute(struct kv_cache *c, const uint8_t *seed, const int32_t *t, int n)
{
    struct kv_seq s;
    assert_int_equal(kv_open(c, seed, t, n, &s, NULL), ERR_OK);
    assert_true(kv_reserve(c, &s, n));
    kv_commit(c, &s, t, n);
    return s;
}

static void check_counts(struct kv_cache *c, int used, int cached)
{
    struct kv_stats st;
    kv_stats(c, &st);
    assert_int_equal(st.used, used);
    assert_int_equal(st.cached, cached);
    assert_int_equal(kv_available(c), st.pages - used);
}

static void a_page_holds_16_positions_of_every_layer_and_head(void **state)
{
    (void)state;
    assert_int_equal(kv_page_bytes(&shape, KV_F16), 3 * 2 * 8 * 16 * 2 * 2);
    assert_int_equal(kv_page_bytes(&shape, KV_F32), 3 * 2 * 8 * 16 * 2 * 4);
    /* 8 codes and one scale for each; of a head of 80 numbers, 80 codes and three scales. */
    assert_int_equal(kv_page_bytes(&shape, KV_Q8), 3 * 2 * (8 + 2) * 16 * 2);
    const struct arch wide = { .L = 1, .G = 1, .hd = 80 };
    assert_int_equal(kv_page_bytes(&wide, KV_Q8), (80 + 6) * 16 * 2);
    assert_int_equal(kv_pages_for(0), 0);
    assert_int_equal(kv_pages_for(1), 1);
    assert_int_equal(kv_pages_for(16), 1);
    assert_int_equal(kv_pages_for(17), 2);
}

/* Nothing else touches what belongs to one page, layer and head, whatever the type and however many
 * pages there are. */
static void check_places(enum kv_type type, int pages)
{
    struct kv_cache *c;
    const size_t part = kv_part_bytes(type, shape.hd);
    assert_int_equal(kv_create(&shape, type, (size_t)pages * kv_page_bytes(&shape, type), &c, NULL), ERR_OK);
    assert_int_equal(kv_pages(c), pages);
    for (int fill = 0; fill < 2; fill++) {
        uint32_t mark = 1;
        for (int p = 0; p < pages; p++)
            for (int l = 0; l < shape.L; l++)
                for (int g = 0; g < shape.G; g++)
                    for (int kv = 0; kv < 2; kv++, mark++) {
                        uint32_t *at = kv ? kv_v(c, p, l, g) : kv_k(c, p, l, g);
                        assert_int_equal((uintptr_t)at % 32, 0);
                        for (size_t i = 0; i < part / sizeof *at; i++)
                            if (fill == 0)
                                at[i] = mark;
                            else
                                assert_int_equal(at[i], mark);
                    }
    }
    kv_destroy(c);
}

static void keys_and_values_of_different_places_do_not_overlap(void **state)
{
    (void)state;
    for (int t = KV_F16; t <= KV_Q8; t++) {
        check_places((enum kv_type)t, 3);
        check_places((enum kv_type)t, 64);
        check_places((enum kv_type)t, 150);
    }
}

static void a_type_has_a_name(void **state)
{
    (void)state;
    enum kv_type t = KV_F16;
    struct err err = { 0 };
    for (int i = KV_F16; i <= KV_Q8; i++) {
        assert_int_equal(kv_type_parse(kv_type_name((enum kv_type)i), &t, &err), ERR_OK);
        assert_int_equal(t, i);
    }
    assert_int_equal(kv_type_parse("q4", &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "not q4"));
    assert_int_equal(t, KV_Q8);
}

static void a_cache_has_at_least_one_page(void **state)
{
    (void)state;
    struct kv_cache *c;
    assert_int_equal(kv_create(&shape, KV_F32, 1, &c, NULL), ERR_OK);
    assert_int_equal(kv_pages(c), 1);
    assert_int_equal(kv_type_of(c), KV_F32);
    kv_destroy(c);
}

static void the_longest_shared_prefix_of_full_pages_is_attached(void **state)
{
    (void)state;
    struct kv_cache *c = make(10);
    int32_t t[64], u[64];
    count_up(t, 64, 0);
    struct kv_seq a = compute(c, seed_a, t, 40); /* two full pages and a half */
    struct kv_seq b;

    memcpy(u, t, sizeof u);
    assert_int_equal(kv_open(c, seed_a, u, 50, &b, NULL), ERR_OK);
    assert_int_equal(b.len, 32);
    assert_int_equal(b.npages, 2);
    assert_int_equal(b.pages[0], a.pages[0]);
    assert_int_equal(b.pages[1], a.pages[1]);
    kv_close(c, &b);

    u[20] = 99; /* differs in the second page */
    assert_int_equal(kv_open(c, seed_a, u, 50, &b, NULL), ERR_OK);
    assert_int_equal(b.len, 16);
    kv_close(c, &b);

    u[0] = 99;
    assert_int_equal(kv_open(c, seed_a, u, 50, &b, NULL), ERR_OK);
    assert_int_equal(b.len, 0);
    kv_close(c, &b);
    kv_close(c, &a);
    kv_destroy(c);
}

static void the_last_token_is_always_left_to_compute(void **state)
{
    (void)state;
    struct kv_cache *c = make(10);
    int32_t t[48];
    count_up(t, 48, 0);
    struct kv_seq a = compute(c, seed_a, t, 48), b;
    static const struct { int n, len; } cases[] = { { 1, 0 },   { 16, 0 },  { 17, 16 },
                                                    { 32, 16 }, { 33, 32 }, { 48, 32 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(kv_open(c, seed_a, t, cases[i].n, &b, NULL), ERR_OK);
        assert_int_equal(b.len, cases[i].len);
        kv_close(c, &b);
    }
    kv_close(c, &a);
    kv_destroy(c);
}

static void other_seeds_find_nothing(void **state)
{
    (void)state;
    struct kv_cache *c = make(10);
    int32_t t[48];
    count_up(t, 48, 0);
    struct kv_seq a = compute(c, seed_a, t, 48), b;
    assert_int_equal(kv_open(c, seed_b, t, 48, &b, NULL), ERR_OK);
    assert_int_equal(b.len, 0);
    kv_close(c, &b);
    kv_close(c, &a);
    kv_destroy(c);
}

static void closed_pages_stay_findable_until_needed(void **state)
{
    (void)state;
    struct kv_cache *c = make(4);
    int32_t t[64], u[64];
    count_up(t, 64, 0);
    count_up(u, 64, 1000);
    struct kv_seq a = compute(c, seed_a, t, 40);
    check_counts(c, 3, 0);
    kv_close(c, &a);
    check_counts(c, 0, 2); /* the partial page is plainly free */

    struct kv_seq b = compute(c, seed_a, u, 33); /* needs 3: two free ones and one cached */
    check_counts(c, 3, 1);
    struct kv_stats st;
    kv_stats(c, &st);
    assert_int_equal(st.evicted, 1);
    /* the tail went first: the first page of t is still there */
    assert_int_equal(kv_open(c, seed_a, t, 40, &a, NULL), ERR_OK);
    assert_int_equal(a.len, 16);
    kv_close(c, &a);
    kv_close(c, &b);
    kv_destroy(c);
}

static void the_least_recently_used_prefix_is_evicted_first(void **state)
{
    (void)state;
    struct kv_cache *c = make(4);
    int32_t t[3][40];
    struct kv_seq s;
    for (int i = 0; i < 3; i++)
        count_up(t[i], 40, 100 * i);
    for (int i = 0; i < 2; i++) {
        s = compute(c, seed_a, t[i], 17);
        kv_close(c, &s);
    }
    assert_int_equal(kv_open(c, seed_a, t[0], 17, &s, NULL), ERR_OK); /* touch the older one */
    assert_int_equal(s.len, 16);
    kv_close(c, &s);
    struct kv_seq big = compute(c, seed_a, t[2], 40); /* three pages: two free, one evicted */
    assert_int_equal(kv_open(c, seed_a, t[0], 17, &s, NULL), ERR_OK);
    assert_int_equal(s.len, 16);
    kv_close(c, &s);
    assert_int_equal(kv_open(c, seed_a, t[1], 17, &s, NULL), ERR_OK);
    assert_int_equal(s.len, 0);
    kv_close(c, &s);
    kv_close(c, &big);
    kv_destroy(c);
}

static void a_reservation_that_cannot_be_met_changes_nothing(void **state)
{
    (void)state;
    struct kv_cache *c = make(3);
    int32_t t[64];
    count_up(t, 64, 0);
    struct kv_seq a = compute(c, seed_a, t, 20), b;
    assert_int_equal(kv_open(c, seed_b, t, 33, &b, NULL), ERR_OK);
    assert_false(kv_reserve(c, &b, 33));
    assert_int_equal(b.npages, 0);
    assert_true(kv_reserve(c, &b, 16));
    assert_false(kv_reserve(c, &b, 17));
    assert_int_equal(b.npages, 1);
    kv_close(c, &a);
    assert_true(kv_reserve(c, &b, 33));
    kv_close(c, &b);
    check_counts(c, 0, 0);
    kv_destroy(c);
}

static void two_sequences_that_compute_the_same_page_do_not_disturb_each_other(void **state)
{
    (void)state;
    struct kv_cache *c = make(8);
    int32_t t[64];
    count_up(t, 64, 0);
    struct kv_seq a, b, d;
    assert_int_equal(kv_open(c, seed_a, t, 40, &a, NULL), ERR_OK);
    assert_int_equal(kv_open(c, seed_a, t, 40, &b, NULL), ERR_OK);
    assert_true(kv_reserve(c, &a, 40) && kv_reserve(c, &b, 40));
    kv_commit(c, &a, t, 16);
    kv_commit(c, &b, t, 40); /* page 0 is a's in the table, page 1 becomes b's */
    kv_commit(c, &a, t, 40);
    assert_int_equal(a.hashed, 2);
    assert_int_equal(b.hashed, 2);
    assert_memory_equal(a.chain, b.chain, 32);

    assert_int_equal(kv_open(c, seed_a, t, 40, &d, NULL), ERR_OK);
    assert_int_equal(d.pages[0], a.pages[0]);
    assert_int_equal(d.pages[1], b.pages[1]);
    kv_close(c, &a);
    kv_close(c, &b);
    check_counts(c, 2, 0); /* d holds what is shared, the copies are free */
    kv_close(c, &d);
    check_counts(c, 0, 2);
    kv_destroy(c);
}

static void forgetting_empties_the_table_and_leaves_running_sequences_alone(void **state)
{
    (void)state;
    struct kv_cache *c = make(8);
    int32_t t[64];
    count_up(t, 64, 0);
    struct kv_seq a = compute(c, seed_a, t, 40), b = compute(c, seed_b, t, 40), d;
    kv_close(c, &b);
    check_counts(c, 3, 2);
    kv_forget(c);
    check_counts(c, 3, 0);
    assert_int_equal(kv_open(c, seed_a, t, 40, &d, NULL), ERR_OK);
    assert_int_equal(d.len, 0);
    kv_close(c, &d);
    assert_true(kv_reserve(c, &a, 64));
    kv_commit(c, &a, t, 64);
    kv_close(c, &a);
    a = compute(c, seed_a, t, 64); /* computed anew, up to what a had entered since */
    kv_close(c, &a);
    assert_int_equal(kv_available(c), 8);
    kv_destroy(c);
}

/* Random opens, growth and closes against a plain count of who holds what. */
static void no_page_is_ever_lost_or_held_twice(void **state)
{
    (void)state;
    enum { PAGES = 24, SEQS = 6, ROUNDS = 4000 };
    struct kv_cache *c = make(PAGES);
    struct kv_seq s[SEQS] = { { .pages = NULL } };
    int32_t t[SEQS][160];
    int len[SEQS] = { 0 }; /* 0: closed */
    uint32_t r = 12345;
    for (int round = 0; round < ROUNDS; round++) {
        r = r * 1664525 + 1013904223;
        int i = (int)(r >> 8) % SEQS, n = 1 + (int)(r >> 16) % 90;
        if (len[i] == 0) {
            count_up(t[i], 160, (int)(r >> 28) % 3 * 1000); /* few kinds: much sharing */
            assert_int_equal(kv_open(c, seed_a, t[i], n, &s[i], NULL), ERR_OK);
            assert_true(s[i].len < n);
            len[i] = n;
            if (kv_reserve(c, &s[i], n)) {
                kv_commit(c, &s[i], t[i], n);
            } else {
                kv_close(c, &s[i]);
                len[i] = 0;
            }
        } else if (len[i] + n <= 160 && kv_reserve(c, &s[i], len[i] + n)) {
            len[i] += n;
            kv_commit(c, &s[i], t[i], len[i]);
        } else {
            kv_close(c, &s[i]);
            len[i] = 0;
        }
        int held[PAGES] = { 0 }, used = 0;
        for (int k = 0; k < SEQS; k++)
            for (int p = 0; p < s[k].npages; p++)
                held[s[k].pages[p]]++;
        for (int p = 0; p < PAGES; p++)
            used += held[p] > 0;
        struct kv_stats st;
        kv_stats(c, &st);
        assert_int_equal(st.used, used);
        assert_true(st.cached >= 0 && st.used + st.cached <= PAGES);
        /* a partial page is never shared */
        for (int k = 0; k < SEQS; k++)
            if (len[k] % KV_PAGE != 0)
                assert_int_equal(held[s[k].pages[s[k].npages - 1]], 1);
    }
    for (int k = 0; k < SEQS; k++)
        kv_close(c, &s[k]);
    assert_int_equal(kv_available(c), PAGES);
    kv_destroy(c);
}

/* 64 pages of this shape are 2 MiB: one huge page. */
static void memory_is_ready_before_its_pages_are_used(void **state)
{
    (void)state;
    if (!support_can_populate())
        skip();
    enum { AT_ONCE = 64 };
    const struct arch wide = { .L = 4, .G = 2, .hd = 64, .H = 4, .D = 256, .V = 100 };
    const size_t mib2 = AT_ONCE * kv_page_bytes(&wide, KV_F16);
    assert_int_equal(mib2, 2 << 20);
    struct kv_cache *c;
    assert_int_equal(kv_create(&wide, KV_F16, 4 * mib2, &c, NULL), ERR_OK);
    char *p = kv_k(c, 0, 0, 0);
    assert_true(support_wait_resident(p, mib2));
    assert_true(support_stays_absent(p + mib2, 3 * mib2));
    struct kv_seq s;
    const int32_t token = 1;
    assert_int_equal(kv_open(c, seed_a, &token, 1, &s, NULL), ERR_OK);
    assert_true(kv_reserve(c, &s, 1));
    assert_true(support_wait_resident(p, 2 * mib2));
    assert_true(kv_reserve(c, &s, AT_ONCE * KV_PAGE));
    assert_true(support_stays_absent(p + 2 * mib2, 2 * mib2));
    assert_true(kv_reserve(c, &s, AT_ONCE * KV_PAGE + 1));
    assert_true(support_wait_resident(p, 3 * mib2));
    assert_true(support_stays_absent(p + 3 * mib2, mib2));
    kv_close(c, &s);
    assert_int_equal(kv_open(c, seed_b, &token, 1, &s, NULL), ERR_OK);
    assert_true(kv_reserve(c, &s, AT_ONCE * KV_PAGE)); /* used before */
    assert_true(support_stays_absent(p + 3 * mib2, mib2));
    kv_close(c, &s);
    kv_destroy(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_page_holds_16_positions_of_every_layer_and_head),
        cmocka_unit_test(keys_and_values_of_different_places_do_not_overlap),
        cmocka_unit_test(a_type_has_a_name),
        cmocka_unit_test(a_cache_has_at_least_one_page),
        cmocka_unit_test(the_longest_shared_prefix_of_full_pages_is_attached),
        cmocka_unit_test(the_last_token_is_always_left_to_compute),
        cmocka_unit_test(other_seeds_find_nothing),
        cmocka_unit_test(closed_pages_stay_findable_until_needed),
        cmocka_unit_test(the_least_recently_used_prefix_is_evicted_first),
        cmocka_unit_test(a_reservation_that_cannot_be_met_changes_nothing),
        cmocka_unit_test(two_sequences_that_compute_the_same_page_do_not_disturb_each_other),
        cmocka_unit_test(forgetting_empties_the_table_and_leaves_running_sequences_alone),
        cmocka_unit_test(no_page_is_ever_lost_or_held_twice),
        cmocka_unit_test(memory_is_ready_before_its_pages_are_used),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
