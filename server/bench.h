/* bench.h - the harness of `lorad bench`: parts measure, the harness repeats, compares and prints.
 *
 * A part is a function that makes what it measures, fills an array of series and calls
 * bench_measure(): each series is measured once to warm up, then `rounds` times in turn (A B C A B C
 * ...), because clocks and memory drift and what is compared must meet the same weather.  From the
 * series it makes rows: a row is a value, with or without a reference of the same run.  The ratio of
 * a row is the median of the rounds' ratios, not the ratio of medians.
 *
 * Whatever rows with a target (bench_targets.c) no part has measured are listed at the end, each with
 * the reason, so that none is forgotten.
 *
 * To add a part: write bench_NAME.c with a `const struct bench_part`, name it in the table of
 * bench_parts.c, and put its targets into bench_targets.c.  One thread calls all of this. */
#ifndef SERVER_BENCH_H
#define SERVER_BENCH_H

#include "engine/compute.h"
#include "engine/err.h"
#include "engine/synthetic.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { BENCH_ROUNDS_MAX = 99, BENCH_SHAPES_MAX = 8, BENCH_ID_MAX = 64 };

/* What is measured again and again. */
struct bench_series {
    const char *name; /* what it is called where it is a reference: "streaming read" */
    const char *unit; /* "tokens/s" */
    /* One round's value into *ret, a finite number above 0. */
    int (*measure)(void *arg, double *ret, struct err *err);
    void *arg;
    /* filled by bench_measure(): */
    int n;
    double v[BENCH_ROUNDS_MAX];
    double foreign;   /* share of the machine's CPU time that others took meanwhile */
    double began, own, busy; /* sums for that: seconds elapsed, ours, the machine's */
};

struct bench_rows; /* what was measured so far: bench_out.c */

struct bench {
    struct compute compute; /* threads and instruction set; a part sets the precision */
    const char *shapes[BENCH_SHAPES_MAX]; /* synthetic.h; what --shape asks for */
    int nshapes;
    bool precisions[3];     /* [enum precision]: which are wanted; never f32 */
    int rounds;             /* 1..BENCH_ROUNDS_MAX */
    bool quick;             /* fewer repeats, smaller sizes: for CI and the curious */
    double min_seconds;     /* how long one round lasts at least, see bench_time() */
    const char *shared;     /* folder with reference models, or NULL */
    const char *part;       /* that runs now */
    pid_t child;            /* a process that a part has started and whose CPU time counts as ours; or 0 */
    struct bench_rows *rows;
};

struct bench_part {
    const char *name;
    const char *about;      /* a line for --list */
    /* A failure ends this part only: the others still run.  Rows that cannot be measured here are
     * skipped with bench_skip(). */
    int (*run)(struct bench *b, struct err *err);
};
extern const struct bench_part *const bench_parts[]; /* in the order they run; NULL ends it */

/* --- measuring ------------------------------------------------------------------------------- */
/* All series in turn, as above. */
int bench_measure(struct bench *b, struct bench_series *s, int n, struct err *err);
/* Call fn(arg) until b->min_seconds have passed, at least once: seconds per call. */
double bench_time(const struct bench *b, void (*fn)(void *arg), void *arg);

/* The same rounds in another unit: values times `factor`. */
struct bench_series bench_scaled(const struct bench_series *s, const char *unit, double factor);

/* --- reporting ------------------------------------------------------------------------------- */
/* A row.  `ref` may be NULL; else the ratio is value * scale / reference, round by round.  The id is made
 * by `fmt`, dots between its words: "decode.1.1b.fast.b16". */
int bench_row(struct bench *b, const struct bench_series *value, const struct bench_series *ref,
              double scale, struct err *err, const char *fmt, ...) __attribute__((format(printf, 6, 7)));
/* The same for a single number that was not repeated (bytes, a percentile).  `of`: the series in whose
 * rounds it was found, for the load of others meanwhile; NULL where no load can change it. */
int bench_number(struct bench *b, double value, const char *unit, const struct bench_series *of,
                 struct err *err, const char *fmt, ...) __attribute__((format(printf, 6, 7)));
/* Rows `id` and `id.*` are not measured: why, one sentence without a full stop. */
void bench_skip(struct bench *b, const char *id, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Whether `bytes` can be taken now (free memory, the cgroup's limit); if not, skips `id`. */
bool bench_room(struct bench *b, const char *id, size_t bytes);

/* --- the rest is for the harness itself -------------------------------------------------------- */
struct bench_target {
    const char *id;     /* of the row it judges */
    const char *part;   /* which measures it */
    const char *peer_of;/* a row whose value is divided by a figure that the user gives (--peer); or NULL */
    bool of_ratio;      /* judged is the row's ratio, else its value */
    bool at_most;       /* else at least */
    double bound;
    const char *what;   /* in words */
};
extern const struct bench_target bench_targets[]; /* id NULL ends it */
const struct bench_target *bench_target_find(const char *id); /* or NULL */
bool bench_target_met(const struct bench_target *t, double x);

/* bench_stats.c */
double bench_median(const double *v, int n);
/* Half of the distance from the least to the largest, over the median. */
double bench_spread(const double *v, int n);

/* bench_machine.c */
json_t *bench_machine(const struct bench *b); /* new; NULL: no memory */
/* CPU seconds since boot that all CPUs were busy (or taken away by the host), and that this process
 * and `child` were. */
double bench_busy_seconds(void);
double bench_own_seconds(pid_t child);
int bench_cpus_online(void);
size_t bench_memory_free(void); /* bytes that can be taken without swapping */

/* bench_out.c */
struct bench_rows *bench_rows_new(void);
void bench_rows_free(struct bench_rows *r);
/* A peer's figure for a row with a target: "ID=VALUE". */
int bench_rows_peer(struct bench_rows *r, const char *arg, struct err *err);
/* Table to stdout as rows come; false: only collected (the JSON goes there). */
void bench_rows_print(struct bench_rows *r, bool print);
void bench_out_begin(struct bench *b, const json_t *machine);
/* Targets whose rows need a peer or were not measured; how many were met. */
int bench_out_end(struct bench *b, struct err *err);
/* Everything as JSON to the file ("-": stdout). */
int bench_out_json(struct bench *b, json_t *machine, const char *path, struct err *err);

#endif
