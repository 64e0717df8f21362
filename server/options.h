/* options.h - flags, environment and config file from one table per command.
 *
 * A value comes from the first of: the command line (--name VALUE, --name=VALUE, or the short
 * form), the environment (LORAD_NAME, dashes as underscores), the config file (--config FILE or
 * LORAD_CONFIG: lines `name = value`, # comments), the default in the table.  --help prints the
 * table with the defaults and exits 0; anything not understood names itself and exits 2.
 * One thread. */
#ifndef SERVER_OPTIONS_H
#define SERVER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct opt {
    const char *name;   /* without dashes; NULL ends the table */
    char letter;        /* short form, or 0 */
    const char *arg;    /* what to call the value in --help; NULL: a flag */
    const char *def;    /* default, or NULL */
    const char *help;
    bool many;          /* may be given more than once (command line only) */
};

struct opts;

/* `usage` is the line after "usage: lorad ", `about` a paragraph for --help (may be NULL), min and
 * max the number of other arguments (max -1: any).  On --help prints and sets *ret_exit to 0, on a
 * mistake prints one sentence and sets it to 2; both return NULL. */
struct opts *opts_parse(int argc, char **argv, const struct opt *table, const char *usage,
                        const char *about, int min_args, int max_args, int *ret_exit);
void opts_free(struct opts *o);

const char *opt_str(const struct opts *o, const char *name);   /* NULL: not given, no default */
bool opt_flag(const struct opts *o, const char *name);
size_t opt_count(const struct opts *o, const char *name);      /* for `many` */
const char *opt_nth(const struct opts *o, const char *name, size_t i);
/* The parsers print a sentence naming option and value and return false if it is not one in
 * range. */
bool opt_int(const struct opts *o, const char *name, int64_t min, int64_t max, int64_t *ret);
bool opt_double(const struct opts *o, const char *name, double min, double max, double *ret);
bool opt_bytes(const struct opts *o, const char *name, int64_t *ret); /* "8G"; 0 if not given */

int opts_nargs(const struct opts *o);
const char *opts_arg(const struct opts *o, int i);

/* "lorad: sentence" on stderr; returns `code`, for `return fail(1, ...)`. */
int fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- terminals -------------------------------------------------------------------------- */
/* A progress bar on stderr: nothing unless stderr is a terminal (quiet in a pipe); no colours
 * with NO_COLOR.  Call with done == total to finish the line. */
void progress(const char *what, uint64_t done, uint64_t total);

#endif
