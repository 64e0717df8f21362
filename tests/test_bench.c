/* test_bench.c - the harness of `lorad bench`: the order of measuring, ratios, verdicts, peers, what is
 * said of rows that are not there. */
#include "server/bench.h"
#include "server/cmd.h"

#include "engine/util.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

const char lorad_version[] = "0";

static struct bench start(int rounds)
{
    struct bench b = { .rounds = rounds, .part = "decode", .rows = bench_rows_new() };
    assert_non_null(b.rows);
    bench_rows_print(b.rows, false);
    return b;
}

/* What --json would write; the rows go away. */
static json_t *finish(struct bench *b)
{
    char path[] = "/tmp/lorad-test-XXXXXX";
    struct err err = { 0 };
    json_t *machine = json_pack("{s:s}", "cpu", "none");
    json_error_t bad;
    close(mkstemp(path));
    assert_int_equal(bench_out_end(b, &err), ERR_OK);
    assert_int_equal(bench_out_json(b, machine, path, &err), ERR_OK);
    json_t *j = json_load_file(path, 0, &bad);
    assert_non_null(j);
    unlink(path);
    json_decref(machine);
    bench_rows_free(b->rows);
    return j;
}

static const json_t *row_of(const json_t *all, const char *id)
{
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(all, "rows"), i, row)
        if (strcmp(json_string_value(json_object_get(row, "id")), id) == 0)
            return row;
    return NULL;
}

static double number(const json_t *row, const char *key) { return json_number_value(json_object_get(row, key)); }
static const char *text(const json_t *row, const char *key) { return json_string_value(json_object_get(row, key)); }

/* --- measuring --------------------------------------------------------------------------------- */
static char order[64];

struct scripted {
    char letter;
    const double *values; /* the first is the warm-up's */
    int at;
};

static int say(void *arg, double *ret, struct err *err)
{
    struct scripted *s = arg;
    (void)err;
    strncat(order, &s->letter, 1);
    *ret = s->values[s->at++];
    return ERR_OK;
}

static void series_are_measured_in_turn_and_the_first_round_does_not_count(void **state)
{
    static const double a[] = { 1000, 1, 3, 2 }, b[] = { 1000, 10, 10, 40 };
    (void)state;
    struct bench h = start(3);
    struct err err = { 0 };
    struct scripted x = { 'a', a, 0 }, y = { 'b', b, 0 };
    struct bench_series s[2] = { { .name = "x", .unit = "u", .measure = say, .arg = &x },
                                 { .name = "y", .unit = "u", .measure = say, .arg = &y } };
    order[0] = '\0';
    assert_int_equal(bench_measure(&h, s, 2, &err), ERR_OK);
    assert_string_equal(order, "abababab");
    assert_int_equal(bench_row(&h, &s[1], &s[0], 2, &err, "some.row"), ERR_OK);
    json_t *j = finish(&h);
    const json_t *row = row_of(j, "some.row");
    assert_non_null(row);
    assert_true(number(row, "value") == 10);
    /* the median of 20, 6 2/3 and 40; twice the median of one over that of the other would be 10 */
    assert_true(fabs(number(row, "ratio") - 20) < 1e-9);
    assert_true(fabs(number(row, "spread") - 1.5) < 1e-9);
    assert_string_equal(text(row, "verdict"), "no target");
    assert_int_equal(json_array_size(json_object_get(row, "values")), 3);
    json_decref(j);
}

static void a_round_that_measures_nothing_is_an_error(void **state)
{
    static const double bad[][2] = { { 1, NAN }, { 1, 0 }, { 1, -2 }, { 1, INFINITY } };
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        struct bench h = start(1);
        struct err err = { 0 };
        struct scripted x = { 'a', bad[i], 0 };
        struct bench_series s = { .name = "x", .unit = "u", .measure = say, .arg = &x };
        assert_int_equal(bench_measure(&h, &s, 1, &err), ERR_INTERNAL);
        assert_non_null(strstr(err.msg, "decode"));
        bench_rows_free(h.rows);
    }
}

static int spin(void *arg, double *ret, struct err *err)
{
    const double until = now_mono() + 0.2;
    (void)arg;
    (void)err;
    while (now_mono() < until)
        ;
    *ret = 1;
    return ERR_OK;
}

static void our_own_work_is_not_foreign(void **state)
{
    (void)state;
    struct bench h = start(1);
    struct err err = { 0 };
    struct bench_series s = { .name = "x", .unit = "u", .measure = spin };
    assert_int_equal(bench_measure(&h, &s, 1, &err), ERR_OK);
    assert_true(s.own > 0); /* how much depends on what else runs here */
    assert_true(s.foreign >= 0 && s.foreign <= 1);
    assert_true(s.foreign * s.began * bench_cpus_online() <= fmax(s.busy - s.own, 0) + 1e-9);
    bench_rows_free(h.rows);
}

static void medians_and_spreads(void **state)
{
    static const double v[] = { 5, 1, 4, 2 };
    (void)state;
    assert_true(bench_median(v, 3) == 4);
    assert_true(bench_median(v, 4) == 3);
    assert_true(bench_median(v, 0) == 0);
    assert_true(fabs(bench_spread(v, 4) - 2.0 / 3) < 1e-12);
}

/* --- verdicts ---------------------------------------------------------------------------------- */
static int one_number(struct bench *h, const char *id, double value, double ref)
{
    struct bench_series a = { .name = "a", .unit = "tokens/s", .n = 1, .v = { value } };
    struct bench_series b = { .name = "b", .unit = "tokens/s", .n = 1, .v = { ref } };
    return bench_row(h, &a, ref > 0 ? &b : NULL, 1, NULL, "%s", id);
}

static void rows_are_judged_by_their_targets(void **state)
{
    (void)state;
    struct bench h = start(1);
    assert_int_equal(one_number(&h, "decode.1.1b.fast.b1.read", 90, 100), ERR_OK);
    assert_int_equal(one_number(&h, "decode.1.1b.exact.b1.read", 89.9, 100), ERR_OK);
    assert_int_equal(one_number(&h, "load.1.1b", 1, 0), ERR_OK);
    assert_int_equal(one_number(&h, "registry.lookup", 1.01, 0), ERR_OK);
    json_t *j = finish(&h);
    assert_string_equal(text(row_of(j, "decode.1.1b.fast.b1.read"), "verdict"), "met");
    assert_string_equal(text(row_of(j, "decode.1.1b.exact.b1.read"), "verdict"), "MISSED");
    assert_string_equal(text(row_of(j, "load.1.1b"), "verdict"), "met");
    assert_string_equal(text(row_of(j, "registry.lookup"), "verdict"), "MISSED");
    json_decref(j);
}

static void every_target_has_a_row_with_the_reason_why_it_was_not_measured(void **state)
{
    (void)state;
    struct bench h = start(1);
    assert_int_equal(one_number(&h, "decode.1.1b.fast.b1", 60, 0), ERR_OK);
    bench_skip(&h, "mixed.1.1b", "there is no %s", "memory");
    bench_skip(&h, "load.1.1", "this is another row");
    json_t *j = finish(&h);
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++) {
        const json_t *row = row_of(j, t->id);
        assert_non_null(row);
        assert_string_equal(text(row, "verdict"), "open");
        assert_string_equal(text(row, "what"), t->what);
    }
    assert_string_equal(text(row_of(j, "mixed.1.1b.fast.r16.a16"), "why"), "not measured: there is no memory");
    assert_non_null(strstr(text(row_of(j, "load.1.1b"), "why"), "not asked for (part load)"));
    assert_non_null(strstr(text(row_of(j, "decode.1.1b.llama.cpp"), "why"),
                           "--peer decode.1.1b.llama.cpp=NUMBER, its tokens/s"));
    json_decref(j);
}

static void what_ends_a_part_is_the_reason_of_its_targets_under_other_names(void **state)
{
    (void)state;
    struct bench h = start(1);
    h.part = "http";
    bench_skip(&h, "http.135m", "needs more memory");
    json_t *j = finish(&h);
    assert_string_equal(text(row_of(j, "serving.job"), "why"), "not measured: http.135m needs more memory");
    assert_string_equal(text(row_of(j, "http.135m.c8.steady"), "why"), "not measured: needs more memory");
    assert_non_null(strstr(text(row_of(j, "http.1.1b.c8.steady"), "why"), "not asked for"));
    json_decref(j);
    h = start(1);
    h.part = "http";
    bench_skip(&h, "http", "it failed: no port");
    j = finish(&h);
    assert_string_equal(text(row_of(j, "serving.job"), "why"), "not measured: it failed: no port");
    assert_non_null(strstr(text(row_of(j, "load.1.1b"), "why"), "not asked for"));
    json_decref(j);
}

static void targets_belong_to_rows_and_parts_that_exist(void **state)
{
    (void)state;
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++) {
        assert_ptr_equal(bench_target_find(t->id), t); /* once only */
        assert_true(strlen(t->id) < BENCH_ID_MAX);
        assert_true(t->bound > 0);
        assert_true(t->peer_of == NULL || t->of_ratio);
    }
}

/* What others took while a series was measured is said of all that comes from it. */
static void foreign_load_is_noted_on_numbers_and_peers(void **state)
{
    struct bench_series s = { .name = "a", .unit = "tokens/s", .n = 1, .v = { 61 }, .foreign = 0.25 };
    (void)state;
    struct bench h = start(1);
    assert_int_equal(bench_rows_peer(h.rows, "decode.1.1b.llama.cpp=40", NULL), ERR_OK);
    assert_int_equal(bench_row(&h, &s, NULL, 0, NULL, "decode.1.1b.fast.b1"), ERR_OK);
    assert_int_equal(bench_number(&h, 3, "ms", &s, NULL, "some.p95"), ERR_OK);
    assert_int_equal(bench_number(&h, 3, "bytes", NULL, NULL, "some.size"), ERR_OK);
    json_t *j = finish(&h);
    assert_true(number(row_of(j, "decode.1.1b.llama.cpp"), "foreign") == 0.25);
    assert_true(number(row_of(j, "some.p95"), "foreign") == 0.25);
    assert_true(number(row_of(j, "some.size"), "foreign") == 0);
    json_decref(j);
}

/* --- peers ------------------------------------------------------------------------------------- */
static void a_peers_figure_makes_the_row_that_compares_with_it(void **state)
{
    (void)state;
    struct bench h = start(1);
    assert_int_equal(bench_rows_peer(h.rows, "decode.1.1b.llama.cpp=40", NULL), ERR_OK);
    assert_int_equal(bench_rows_peer(h.rows, "train.1.1b.memory.pytorch=1000", NULL), ERR_OK);
    assert_int_equal(one_number(&h, "decode.1.1b.fast.b1", 61, 0), ERR_OK);
    assert_int_equal(one_number(&h, "train.1.1b.memory", 251, 0), ERR_OK);
    json_t *j = finish(&h);
    const json_t *decode = row_of(j, "decode.1.1b.llama.cpp"), *memory = row_of(j, "train.1.1b.memory.pytorch");
    assert_true(fabs(number(decode, "ratio") - 1.525) < 1e-9);
    assert_string_equal(text(decode, "verdict"), "met");
    assert_true(number(json_object_get(decode, "reference"), "value") == 40);
    assert_string_equal(text(memory, "verdict"), "MISSED");
    json_decref(j);
}

static void what_is_no_peer_is_refused_by_name(void **state)
{
    static const char *const bad[][2] = {
        { "decode.1.1b.llama.cpp", "is not ROW=NUMBER" },
        { "=3", "is not ROW=NUMBER" },
        { "", "is not ROW=NUMBER" },
        { "decode.1.1b=3", "no row of that name" },
        { "load.1.1b=3", "no row of that name" },
        { "decode.1.1b.fastest=fast", "needs a number above 0, not fast" },
        { "decode.1.1b.fastest=", "needs a number above 0" },
        { "decode.1.1b.fastest=0", "needs a number above 0" },
        { "decode.1.1b.fastest=nan", "needs a number above 0" },
        { "decode.1.1b.fastest=inf", "needs a number above 0" },
        { "decode.1.1b.fastest=-1", "needs a number above 0" },
        { "decode.1.1b.fastest=3x", "needs a number above 0" },
    };
    (void)state;
    struct bench h = start(1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err err = { 0 };
        assert_int_equal(bench_rows_peer(h.rows, bad[i][0], &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, bad[i][1]));
    }
    struct err err = { 0 };
    assert_int_equal(bench_rows_peer(h.rows, "decode.1.1b.fastest=3", &err), ERR_OK);
    assert_int_equal(bench_rows_peer(h.rows, "decode.1.1b.fastest=3", &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "given twice"));
    bench_rows_free(h.rows);
}

/* --- memory, files ------------------------------------------------------------------------------ */
static void what_does_not_fit_is_skipped_with_the_arithmetic(void **state)
{
    (void)state;
    struct bench h = start(1);
    assert_true(bench_room(&h, "decode.tiny", 1));
    assert_false(bench_room(&h, "mixed.1.1b", (size_t)1 << 60));
    json_t *j = finish(&h);
    assert_int_equal(json_array_size(json_object_get(j, "skipped")), 1);
    const char *why = text(row_of(j, "mixed.1.1b.exact.r16.a16"), "why");
    assert_non_null(strstr(why, "of memory, and"));
    json_decref(j);
}

static void a_file_that_cannot_be_written_is_an_error(void **state)
{
    (void)state;
    struct bench h = start(1);
    struct err err = { 0 };
    json_t *machine = json_object();
    assert_int_equal(bench_out_json(&h, machine, "/nowhere/at/all.json", &err), ERR_IO);
    assert_non_null(strstr(err.msg, "/nowhere/at/all.json"));
    err_clear(&err);
    assert_int_equal(bench_out_json(&h, machine, "/dev/full", &err), ERR_IO);
    assert_non_null(strstr(err.msg, "No space left"));
    json_decref(machine);
    bench_rows_free(h.rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(series_are_measured_in_turn_and_the_first_round_does_not_count),
        cmocka_unit_test(a_round_that_measures_nothing_is_an_error),
        cmocka_unit_test(our_own_work_is_not_foreign),
        cmocka_unit_test(medians_and_spreads),
        cmocka_unit_test(rows_are_judged_by_their_targets),
        cmocka_unit_test(every_target_has_a_row_with_the_reason_why_it_was_not_measured),
        cmocka_unit_test(what_ends_a_part_is_the_reason_of_its_targets_under_other_names),
        cmocka_unit_test(targets_belong_to_rows_and_parts_that_exist),
        cmocka_unit_test(foreign_load_is_noted_on_numbers_and_peers),
        cmocka_unit_test(a_peers_figure_makes_the_row_that_compares_with_it),
        cmocka_unit_test(what_is_no_peer_is_refused_by_name),
        cmocka_unit_test(what_does_not_fit_is_skipped_with_the_arithmetic),
        cmocka_unit_test(a_file_that_cannot_be_written_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
