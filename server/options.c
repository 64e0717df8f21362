/* options.c - flags, environment and config file from one table per command. */
#include "server/options.h"

#include "engine/util.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct value {
    char **text; /* one, or more for `many` */
    size_t n;
};

struct opts {
    const struct opt *table;
    size_t nopts;
    struct value *values;
    char **args; /* borrowed from argv */
    int nargs;
    char *config; /* the config file's text, cut up in place */
};

/* Options that every command has. */
static const struct opt common[] = {
    { "config", 0, "FILE", NULL, "read options from FILE (lines `name = value`)", false },
    { "help", 'h', NULL, NULL, "print this and exit", false },
};

int fail(int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("lorad: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    return code;
}

static void print_option(const struct opt *o)
{
    char left[64];
    char letter[8] = "    ";
    if (o->letter != 0)
        snprintf(letter, sizeof letter, "-%c, ", o->letter);
    snprintf(left, sizeof left, "%s--%s%s%s", letter, o->name, o->arg ? " " : "",
             o->arg ? o->arg : "");
    printf("  %-28s %s", left, o->help);
    if (o->def != NULL)
        printf(" [%s]", o->def);
    putchar('\n');
}

static void print_help(const struct opt *table, const char *usage, const char *about)
{
    printf("usage: lorad %s\n", usage);
    if (about != NULL)
        printf("\n%s\n", about);
    printf("\noptions (defaults in brackets; LORAD_NAME in the environment works too):\n");
    for (const struct opt *o = table; o->name != NULL; o++)
        print_option(o);
    for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
        print_option(&common[i]);
}

static int find(const struct opts *o, const char *name, size_t len)
{
    for (size_t i = 0; i < o->nopts; i++)
        if (strlen(o->table[i].name) == len && memcmp(o->table[i].name, name, len) == 0)
            return (int)i;
    return -1;
}

static int must_find(const struct opts *o, const char *name)
{
    int i = find(o, name, strlen(name));
    if (i < 0) { /* a mistake in the program, not of its user */
        fprintf(stderr, "lorad: option --%s is not in the command's table\n", name);
        abort();
    }
    return i;
}

static bool add_value(struct value *v, const char *text)
{
    char **grown = realloc(v->text, (v->n + 1) * sizeof *grown);
    if (grown == NULL)
        return false;
    v->text = grown;
    v->text[v->n] = strdup(text);
    return v->text[v->n++] != NULL;
}

/* 0, or 2 after a sentence. */
static int set(struct opts *o, int i, const char *text)
{
    const struct opt *opt = &o->table[i];
    if (o->values[i].n > 0 && !opt->many)
        return fail(2, "--%s is given twice", opt->name);
    return add_value(&o->values[i], text) ? 0 : fail(2, "out of memory");
}

/* The option that argv[*pos] names, and its value ("1" for a flag).  Returns -1 after a sentence,
 * or the index. */
static int take(struct opts *o, int argc, char **argv, int *pos, const char **ret_value,
                const char **ret_config, bool *ret_help)
{
    const char *arg = argv[*pos];
    const struct opt *opt = NULL;
    const char *value = NULL;
    int index = -1;
    if (arg[1] == '-') {
        const char *eq = strchr(arg, '=');
        size_t len = eq != NULL ? (size_t)(eq - arg - 2) : strlen(arg + 2);
        index = find(o, arg + 2, len);
        value = eq != NULL ? eq + 1 : NULL;
        if (index < 0)
            for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
                if (strlen(common[i].name) == len && memcmp(common[i].name, arg + 2, len) == 0)
                    opt = &common[i];
    } else {
        for (size_t i = 0; i < o->nopts; i++)
            if (o->table[i].letter == arg[1])
                index = (int)i;
        if (index < 0 && arg[1] == 'h')
            opt = &common[1];
        if (arg[2] != '\0')
            value = arg + 2;
    }
    if (index >= 0)
        opt = &o->table[index];
    if (opt == NULL)
        return fail(-1, "unknown option %s; --help lists them", arg);
    if (opt->arg == NULL) {
        if (value != NULL)
            return fail(-1, "--%s takes no value", opt->name);
        value = "1";
    } else if (value == NULL) {
        if (*pos + 1 >= argc)
            return fail(-1, "--%s needs a value (%s)", opt->name, opt->arg);
        value = argv[++*pos];
    }
    if (opt == &common[0])
        *ret_config = value;
    if (opt == &common[1])
        *ret_help = true;
    *ret_value = value;
    return index >= 0 ? index : (int)o->nopts;
}

static int from_argv(struct opts *o, int argc, char **argv, const char **ret_config, bool *ret_help)
{
    bool only_args = false;
    for (int i = 1; i < argc; i++) {
        if (only_args || argv[i][0] != '-' || argv[i][1] == '\0') {
            o->args[o->nargs++] = argv[i];
            continue;
        }
        if (strcmp(argv[i], "--") == 0) {
            only_args = true;
            continue;
        }
        const char *value = NULL;
        int index = take(o, argc, argv, &i, &value, ret_config, ret_help);
        if (index < 0 || value == NULL)
            return 2;
        if (index < (int)o->nopts && set(o, index, value) != 0)
            return 2;
    }
    return 0;
}

/* LORAD_KV_BYTES for kv-bytes. */
static const char *from_environment(const char *name)
{
    char env[80] = "LORAD_";
    size_t n = strlen(env);
    for (; *name != '\0' && n + 1 < sizeof env; name++)
        env[n++] = *name == '-' ? '_' : (char)toupper((unsigned char)*name);
    env[n] = '\0';
    return getenv(env);
}

static bool flag_value(const char *text) { return strcmp(text, "0") != 0 && strcmp(text, "false") != 0; }

static char *trim(char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    size_t n = strlen(s);
    while (n > 0 && isspace((unsigned char)s[n - 1]))
        s[--n] = '\0';
    return s;
}

/* A file may serve several commands, so a name that this command lacks is not a mistake. */
static int from_file(struct opts *o, const char *path)
{
    struct err err = { 0 };
    size_t len;
    if (file_read(path, 1 << 20, &o->config, &len, &err) != ERR_OK)
        return fail(2, "%s", err.msg);
    int line_number = 0;
    for (char *line = o->config, *next; line != NULL; line = next) {
        next = strchr(line, '\n');
        if (next != NULL)
            *next++ = '\0';
        line_number++;
        char *s = trim(line);
        if (*s == '\0' || *s == '#')
            continue;
        char *eq = strchr(s, '=');
        if (eq == NULL)
            return fail(2, "%s line %d: not `name = value`: %s", path, line_number, s);
        *eq = '\0';
        char *name = trim(s), *value = trim(eq + 1);
        int i = find(o, name, strlen(name));
        if (i >= 0 && o->values[i].n == 0 && set(o, i, value) != 0)
            return 2;
    }
    return 0;
}

static int fill(struct opts *o, int argc, char **argv, bool *ret_help)
{
    const char *config = NULL;
    int rc = from_argv(o, argc, argv, &config, ret_help);
    if (rc != 0 || *ret_help)
        return rc;
    for (size_t i = 0; i < o->nopts; i++) {
        const char *env = from_environment(o->table[i].name);
        if (o->values[i].n == 0 && env != NULL && *env != '\0' && set(o, (int)i, env) != 0)
            return 2;
    }
    if (config == NULL)
        config = getenv("LORAD_CONFIG");
    if (config != NULL && *config != '\0')
        rc = from_file(o, config);
    for (size_t i = 0; i < o->nopts && rc == 0; i++)
        if (o->values[i].n == 0 && o->table[i].def != NULL)
            rc = set(o, (int)i, o->table[i].def);
    return rc;
}

struct opts *opts_parse(int argc, char **argv, const struct opt *table, const char *usage,
                        const char *about, int min_args, int max_args, int *ret_exit)
{
    *ret_exit = 2;
    struct opts *o = calloc(1, sizeof *o);
    if (o == NULL)
        return NULL;
    o->table = table;
    while (table[o->nopts].name != NULL)
        o->nopts++;
    o->values = calloc(o->nopts + 1, sizeof *o->values);
    o->args = calloc((size_t)argc + 1, sizeof *o->args);
    bool help = false;
    if (o->values == NULL || o->args == NULL || fill(o, argc, argv, &help) != 0)
        goto stop;
    if (help) {
        print_help(table, usage, about);
        *ret_exit = 0;
        goto stop;
    }
    if (o->nargs < min_args || (max_args >= 0 && o->nargs > max_args)) {
        fail(2, "%s\nusage: lorad %s", o->nargs < min_args ? "something is missing" :
             "too many arguments", usage);
        goto stop;
    }
    *ret_exit = 0;
    return o;

stop:
    opts_free(o);
    return NULL;
}

void opts_free(struct opts *o)
{
    if (o == NULL)
        return;
    for (size_t i = 0; o->values != NULL && i < o->nopts; i++) {
        for (size_t k = 0; k < o->values[i].n; k++)
            free(o->values[i].text[k]);
        free(o->values[i].text);
    }
    free(o->values);
    free(o->args);
    free(o->config);
    free(o);
}

const char *opt_str(const struct opts *o, const char *name) { return opt_nth(o, name, 0); }

bool opt_flag(const struct opts *o, const char *name)
{
    const char *v = opt_str(o, name);
    return v != NULL && flag_value(v);
}

size_t opt_count(const struct opts *o, const char *name) { return o->values[must_find(o, name)].n; }

const char *opt_nth(const struct opts *o, const char *name, size_t i)
{
    const struct value *v = &o->values[must_find(o, name)];
    return i < v->n ? v->text[i] : NULL;
}

bool opt_int(const struct opts *o, const char *name, int64_t min, int64_t max, int64_t *ret)
{
    const char *s = opt_str(o, name);
    if (s == NULL)
        return true;
    char *end;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (errno != 0 || end == s || *end != '\0' || v < min || v > max) {
        fail(2, "--%s must be a whole number from %lld to %lld, not %s", name, (long long)min,
             (long long)max, s);
        return false;
    }
    *ret = v;
    return true;
}

bool opt_double(const struct opts *o, const char *name, double min, double max, double *ret)
{
    const char *s = opt_str(o, name);
    if (s == NULL)
        return true;
    char *end;
    double v = strtod(s, &end);
    if (end == s || *end != '\0' || !(v >= min && v <= max)) {
        fail(2, "--%s must be a number from %g to %g, not %s", name, min, max, s);
        return false;
    }
    *ret = v;
    return true;
}

bool opt_bytes(const struct opts *o, const char *name, int64_t *ret)
{
    const char *s = opt_str(o, name);
    int64_t v = s != NULL ? parse_bytes(s) : 0;
    if (v < 0) {
        fail(2, "--%s must be a size such as 512M or 8G, not %s", name, s);
        return false;
    }
    *ret = v;
    return true;
}

int opts_nargs(const struct opts *o) { return o->nargs; }
const char *opts_arg(const struct opts *o, int i) { return i < o->nargs ? o->args[i] : NULL; }

void progress(const char *what, uint64_t done, uint64_t total)
{
    static double last;
    if (!isatty(STDERR_FILENO))
        return;
    double now = now_mono();
    if (done < total && now - last < 0.1)
        return;
    last = now;
    char bar[31];
    int full = total > 0 ? (int)((double)done / (double)total * 30) : 30;
    for (int i = 0; i < 30; i++)
        bar[i] = i < full ? '#' : '.';
    bar[30] = '\0';
    char a[32], b[32];
    fprintf(stderr, "\r[%s] %s of %s  %-40.40s", bar, human_bytes(done, a), human_bytes(total, b),
            what);
    if (done >= total)
        fputc('\n', stderr);
}
