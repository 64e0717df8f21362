/* test_histogram.c - histograms of times, counted once more with numbers kept aside. */
#include "engine/histogram.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static void every_time_falls_into_the_bucket_whose_end_it_does_not_pass(void **state)
{
    (void)state;
    struct histogram h = { 0 };
    struct histogram_stats s;
    for (int i = 0; i < HISTOGRAM_BOUNDS; i++) {
        assert_true(i == 0 || histogram_bounds[i] > histogram_bounds[i - 1]);
        histogram_add(&h, histogram_bounds[i]);
        histogram_add(&h, histogram_bounds[i] * 1.0001);
    }
    histogram_read(&h, &s);
    assert_int_equal(s.bucket[0], 1);
    for (int i = 1; i < HISTOGRAM_BOUNDS; i++)
        assert_int_equal(s.bucket[i], 2);
    assert_int_equal(s.bucket[HISTOGRAM_BOUNDS], 1);
}

static void sum_and_longest_are_kept(void **state)
{
    (void)state;
    struct histogram h = { 0 };
    struct histogram_stats s;
    histogram_read(&h, &s);
    assert_float_equal(s.sum, 0, 0);
    assert_float_equal(s.max, 0, 0);
    histogram_add(&h, 0.75);
    histogram_add(&h, 0.125);
    histogram_read(&h, &s);
    assert_float_equal(s.sum, 0.875, 1e-8);
    assert_float_equal(s.max, 0.75, 1e-8);
}

static void what_is_no_time_counts_as_none(void **state)
{
    (void)state;
    struct histogram h = { 0 };
    struct histogram_stats s;
    histogram_add(&h, -1);
    histogram_add(&h, (double)NAN);
    histogram_read(&h, &s);
    assert_int_equal(s.bucket[0], 2);
    assert_float_equal(s.sum, 0, 0);
    histogram_add(&h, (double)INFINITY);
    histogram_read(&h, &s);
    assert_int_equal(s.bucket[HISTOGRAM_BOUNDS], 1);
    assert_true(isfinite(s.max) && s.max > 1e6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_time_falls_into_the_bucket_whose_end_it_does_not_pass),
        cmocka_unit_test(sum_and_longest_are_kept),
        cmocka_unit_test(what_is_no_time_counts_as_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
