/* test_train_args.c - whether a run fits into memory, in numbers; times as people read them. */
#include "server/train_args.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static const struct train_estimate run = { .state_bytes = (size_t)3 << 30, .work_bytes = (size_t)1 << 30,
                                           .bytes = (size_t)4 << 30 };

static void a_run_that_fits_to_the_byte_is_let_through(void **state)
{
    struct err err = { 0 };
    (void)state;
    assert_int_equal(train_args_fits(&run, (size_t)7 << 30, "why", &err), ERR_OK);
}

static void a_byte_less_is_refused_with_the_arithmetic(void **state)
{
    struct err err = { 0 };
    (void)state;
    assert_int_equal(train_args_fits(&run, ((size_t)7 << 30) - 1, "of 8 GiB a lot is taken", &err),
                     ERR_TOO_LARGE);
    assert_string_equal(err.slug, "out_of_memory");
    assert_non_null(strstr(err.msg, "needs 7.0 GiB beside the base (twice 3.0 GiB"));
    assert_non_null(strstr(err.msg, "1.0 GiB for activations"));
    assert_non_null(strstr(err.msg, "of 8 GiB a lot is taken"));
}

static void what_is_left_is_used_as_far_as_it_helps(void **state)
{
    struct train_estimate e = run;
    (void)state;
    e.keep_all = (size_t)2 << 30;
    assert_int_equal(train_args_keep(&e, (size_t)7 << 30), 0);
    assert_int_equal(train_args_keep(&e, (size_t)9 << 30), (size_t)1 << 30);
    assert_int_equal(train_args_keep(&e, (size_t)20 << 30), (size_t)2 << 30);
}

static void times_are_short(void **state)
{
    static const struct { double s; const char *text; } cases[] = {
        { 0.25, "250 ms" }, { 45, "45 s" }, { 119.4, "119 s" }, { 600, "10 min" },
        { 7200 + 12 * 60, "2 h 12 min" }, { -1, "0 ms" }, { NAN, "0 ms" }, { INFINITY, "0 ms" },
    };
    char text[32];
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        assert_string_equal(train_args_time(cases[i].s, text), cases[i].text);
}

static void a_step_as_json_has_what_was_measured_and_no_more(void **state)
{
    const struct train_report lora = { .step = 3, .steps = 10, .loss = 1.5, .lr = 1e-4, .tokens = 50,
                                       .seconds = 2, .budget = -1, .threshold = NAN };
    struct train_report adalora = lora;
    const struct train_valid v = { .loss = 2, .accuracy = 0.5 };
    (void)state;
    json_t *j = train_args_step_json(&lora, NULL);
    assert_true(json_number_value(json_object_get(j, "tokens_per_s")) == 25);
    assert_null(json_object_get(j, "valid_loss"));
    assert_null(json_object_get(j, "budget"));
    json_decref(j);
    adalora.budget = 12;
    j = train_args_step_json(&adalora, &v);
    assert_true(json_number_value(json_object_get(j, "valid_loss")) == 2);
    assert_int_equal(json_integer_value(json_object_get(j, "budget")), 12);
    assert_null(json_object_get(j, "threshold")); /* not a number: JSON has none such */
    json_decref(j);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_run_that_fits_to_the_byte_is_let_through),
        cmocka_unit_test(a_byte_less_is_refused_with_the_arithmetic),
        cmocka_unit_test(what_is_left_is_used_as_far_as_it_helps),
        cmocka_unit_test(times_are_short),
        cmocka_unit_test(a_step_as_json_has_what_was_measured_and_no_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
