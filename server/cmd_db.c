/* cmd_db.c - subcommands, opening the database, tables and JSON on stdout. */
#include "server/cmd_db.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int subcmd_usage(const char *command, const struct subcmd *table, FILE *to, int code)
{
    fprintf(to, "usage: lorad %s SUBCOMMAND ...      lorad %s SUBCOMMAND --help\n\n", command,
            command);
    for (const struct subcmd *s = table; s->name != NULL; s++) {
        char left[96];
        snprintf(left, sizeof left, "%s %s", s->name, s->args);
        fprintf(to, "  %-32s %s\n", left, s->summary);
    }
    return code;
}

int subcmd_run(const char *command, const struct subcmd *table, int argc, char **argv)
{
    if (argc < 2)
        return subcmd_usage(command, table, stderr, 2);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return subcmd_usage(command, table, stdout, 0);
    for (const struct subcmd *s = table; s->name != NULL; s++)
        if (strcmp(argv[1], s->name) == 0)
            return s->run(argc - 1, argv + 1);
    fail(2, "there is no command %s %s", command, argv[1]);
    return subcmd_usage(command, table, stderr, 2);
}

int db_fail(const struct err *err) { return fail(1, "%s", err->msg); }

int db_open(const struct opts *o, bool create, struct store **ret)
{
    const char *path = opt_str(o, "db");
    struct err err = { .code = ERR_OK };
    if (path == NULL)
        return fail(2, "say which database: --db FILE, or LORAD_DB in the environment");
    if (!create && !file_exists(path))
        return fail(1, "there is no database %s", path);
    if (store_open(path, ret, &err) != ERR_OK)
        return db_fail(&err);
    return 0;
}

/* --- tables -------------------------------------------------------------------------------- */
void table_init(struct table *t, const char *heading)
{
    t->rc = ERR_OK;
    buf_init(&t->text, (size_t)1 << 30);
    t->rc = buf_printf(&t->text, "%s\n", heading);
}

void table_cell(struct table *t, const char *fmt, ...)
{
    char *text = NULL;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&text, fmt, ap);
    va_end(ap);
    if (n < 0) {
        t->rc = ERR_NOMEM;
        return;
    }
    for (char *p = text; *p != '\0'; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            *p = '?';
    if (t->rc == ERR_OK && t->text.len > 0 && t->text.data[t->text.len - 1] != '\n')
        t->rc = buf_puts(&t->text, "\t");
    if (t->rc == ERR_OK)
        t->rc = buf_puts(&t->text, n > 0 ? text : "-");
    free(text);
}

void table_end_row(struct table *t)
{
    if (t->rc == ERR_OK)
        t->rc = buf_puts(&t->text, "\n");
}

enum { COLUMNS_MAX = 16 };

/* Characters, not bytes. */
static size_t width_of(const char *s, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)s[i] & 0xc0) != 0x80;
    return n;
}

/* Calls fn for each cell of the text. */
static void each_cell(const char *text, size_t width[COLUMNS_MAX], bool print)
{
    int col = 0;
    for (const char *p = text; *p != '\0';) {
        size_t len = strcspn(p, "\t\n");
        const bool last = p[len] == '\n';
        const size_t w = width_of(p, len);
        if (print)
            printf("%.*s%*s", (int)len, p, last ? 0 : (int)(width[col] - w + 2), "");
        else if (w > width[col])
            width[col] = w;
        if (print && last)
            putchar('\n');
        col = last ? 0 : col + 1 < COLUMNS_MAX ? col + 1 : col;
        p += len + 1;
    }
}

int table_print(struct table *t)
{
    size_t width[COLUMNS_MAX] = { 0 };
    int rc = t->rc;
    if (rc == ERR_OK) {
        each_cell(t->text.data, width, false);
        each_cell(t->text.data, width, true);
    }
    buf_free(&t->text);
    return rc == ERR_OK ? output_done() : fail(1, "out of memory");
}

int json_print(json_t *j)
{
    if (j == NULL)
        return fail(1, "out of memory");
    int rc = json_dumpf(j, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
    json_decref(j);
    putchar('\n');
    int out = output_done();
    return rc == 0 ? out : fail(1, "the JSON could not be written");
}

const char *when_text(int64_t ms, char ret[32])
{
    time_t t = (time_t)(ms / 1000);
    struct tm tm;
    if (ms == 0 || gmtime_r(&t, &tm) == NULL)
        snprintf(ret, 32, "never");
    else
        strftime(ret, 32, "%Y-%m-%d %H:%M", &tm);
    return ret;
}

int output_done(void)
{
    if (fflush(stdout) != 0 || ferror(stdout))
        return fail(1, "the output could not be written: %s", strerror(errno));
    return 0;
}
