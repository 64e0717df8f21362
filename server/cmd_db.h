/* cmd_db.h - what the commands that work on a database file share: subcommands, opening the file,
 * printing tables and JSON.  One thread. */
#ifndef SERVER_CMD_DB_H
#define SERVER_CMD_DB_H

#include "engine/util.h"
#include "server/options.h"
#include "store/store.h"

#include <jansson.h>

struct subcmd {
    const char *name;    /* NULL ends the table */
    const char *args;    /* for the usage line */
    const char *summary;
    int (*run)(int argc, char **argv); /* argv[0] is the subcommand's name */
};
/* Runs the one that argv[1] names; prints the table for --help.  Returns the exit code. */
int subcmd_run(const char *command, const struct subcmd *table, int argc, char **argv);

#define OPT_DB { "db", 0, "FILE", NULL, "the database", false }
#define OPT_JSON { "json", 0, NULL, NULL, "print JSON instead of a table", false }

/* The file that --db names; 0, or the exit code after a sentence.  Without `create` it must be
 * there: a mistyped name should not leave an empty database behind. */
int db_open(const struct opts *o, bool create, struct store **ret);
/* "lorad: sentence" on stderr; returns 1. */
int db_fail(const struct err *err);

/* --- printing ------------------------------------------------------------------------------- */
/* Cells are separated by tabs, rows end with a newline; the first row is the heading.  Whatever a
 * terminal would obey (control characters of an uploaded name) is printed as '?'. */
struct table {
    struct buf text;
    int rc; /* first failure */
};
void table_init(struct table *t, const char *heading);
void table_cell(struct table *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void table_end_row(struct table *t);
/* Prints and frees; returns the exit code. */
int table_print(struct table *t);

/* Prints (indented) and releases; returns the exit code.  NULL is out of memory. */
int json_print(json_t *j);
/* "2026-01-31 12:00" UTC, "never" for 0. */
const char *when_text(int64_t ms, char ret[32]);
/* Was everything on stdout really written?  Returns the exit code. */
int output_done(void);

#endif
