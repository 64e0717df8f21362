/* cmd_train.h - what the files of `lorad train` share: the folder and the state file that a run leaves,
 * and what it shows while it runs.  One thread. */
#ifndef SERVER_CMD_TRAIN_H
#define SERVER_CMD_TRAIN_H

#include "engine/train.h"
#include "server/options.h"

#include <jansson.h>
#include <stdio.h>

/* --- files (cmd_train_files.c) ------------------------------------------------------------------ */
/* While a run is under way its folder is DIR.partial, with metrics.jsonl; at the end PEFT's two files go
 * in and it becomes DIR, in one rename.  The state is one file, replaced in one rename:
 * "lorad run 1\n", i64 (little-endian) unix seconds that the data was read with, train_save(). */
struct train_files {
    char *out;      /* DIR, or NULL */
    char *partial;  /* DIR.partial, or NULL */
    char *state;
    FILE *metrics;  /* NULL without a folder */
};
/* DIR must not be there, or be empty.  `out` may be NULL; `state` NULL: OUT.state, or NAME.state. */
int train_files_open(struct train_files *f, const char *out, const char *state, const char *name,
                     struct err *err);
void train_files_close(struct train_files *f);
/* The saved state; free() *ret, of which *ret_at is where train_save()'s bytes begin.  ERR_NOT_FOUND if
 * there is none. */
int train_files_state(const struct train_files *f, char **ret, size_t *ret_at, size_t *ret_len,
                      int64_t *ret_now, struct err *err);
int train_files_save(const struct train_files *f, const struct train *t, int64_t now,
                     struct err *err);
/* Makes the folder, with the metrics of steps 1..step of a run before (0: none of them). */
int train_files_begin(struct train_files *f, int64_t step, struct err *err);
int train_files_metric(struct train_files *f, const json_t *line, struct err *err);
/* The adapter into the folder, the folder under its name. */
int train_files_finish(struct train_files *f, const struct adapter_src *a, struct err *err);
/* The run is over: the state goes. */
void train_files_forget(const struct train_files *f);

/* --- progress (cmd_train_show.c) ---------------------------------------------------------------- */
struct train_show {
    bool json, tty, open; /* open: the last line has no end yet */
    int64_t every;    /* lines in a pipe: one per so many steps */
    double began;     /* of this process */
    int64_t first;    /* step it began after */
    int64_t step;     /* shown last */
};
void train_show_init(struct train_show *s, const struct opts *o, int64_t step, int64_t steps);
/* One step; `line` is its JSON. */
void train_show_step(struct train_show *s, const struct train_report *r,
                     const struct train_valid *v, const json_t *line);
/* Ends a line that is half-written. */
void train_show_end(const struct train_show *s);
/* The most memory this process ever had, in bytes (VmHWM); 0: not known. */
size_t train_show_peak(void);

#endif
