/* dataset.c - training data from bytes to objects, and what is said about them.
 *
 * A file is fed in pieces.  Of lines, those that lie whole in a piece are read where they are, the
 * others are gathered; an element of an array always is, and so may run over lines.  Nothing longer
 * than max_line is kept. */
#include "engine/dataset_int.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utf8proc.h>

enum where { AT_START, IN_LINES, IN_ARRAY, BEHIND_ARRAY, GIVEN_UP };

struct dataset {
    struct reader r;       /* r.m.base NULL: only shapes are checked */
    struct dataset_report rep;
    size_t max_line;
    enum where where;
    uint64_t line;         /* number of the line that is being read */
    struct buf text;       /* of an object that is not all here yet */
    bool too_long;         /* what follows of it is dropped */
    /* IN_ARRAY: */
    uint64_t begun;        /* line of the element's first byte */
    size_t depth;          /* of brackets inside the element */
    bool in_string, escaped, after_comma;
    size_t bom;            /* bytes of a byte order mark seen */
};

void dataset_report_free(struct dataset_report *r)
{
    if (r == NULL)
        return;
    free(r->bad);
    r->bad = NULL;
    r->nbad = 0;
}

/* --- bad lines ---------------------------------------------------------------------------------------- */

/* Sentences quote what they are about, cut anywhere: only whole characters stay, control characters
 * do not. */
static void clean(const char *s, char *ret, size_t cap)
{
    size_t n = 0;
    utf8proc_int32_t c;
    for (size_t left = strlen(s); left > 0;) {
        const utf8proc_ssize_t used =
            utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)left, &c);
        const size_t len = used > 0 ? (size_t)used : 1;
        if (n + len >= cap)
            break;
        if (used > 0 && c >= ' ' && c != 0x7f)
            memcpy(ret + n, s, len);
        else
            memset(ret + n, '?', len);
        n += len;
        s += len;
        left -= len;
    }
    ret[n] = '\0';
}

static int bad_line(struct dataset *d, uint64_t line, const char *why, struct err *err)
{
    d->rep.lines++;
    d->rep.bad_lines++;
    if (d->rep.nbad == DATASET_BAD_KEPT)
        return ERR_OK;
    if (d->rep.bad == NULL) {
        d->rep.bad = calloc(DATASET_BAD_KEPT, sizeof *d->rep.bad);
        if (d->rep.bad == NULL)
            return err_nomem(err);
    }
    struct dataset_bad *b = &d->rep.bad[d->rep.nbad++];
    b->line = line;
    clean(why, b->why, sizeof b->why);
    return ERR_OK;
}

/* --- one object --------------------------------------------------------------------------------------- */

/* Values and members are many times larger in memory than in text, so they are counted first: what
 * begins or parts them, outside strings. */
static size_t count_values(const char *text, size_t len)
{
    size_t n = 1;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        if (in_string && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            in_string = !in_string;
        else if (!in_string)
            n += text[i] == '{' || text[i] == '[' || text[i] == ',';
    }
    return n;
}

static json_t *parse(const char *text, size_t len, struct err *err)
{
    json_error_t why;
    if (count_values(text, len) > DATASET_MAX_VALUES) {
        err_set(err, ERR_INVALID, "it has more than %d values", DATASET_MAX_VALUES);
        return NULL;
    }
    json_t *v = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_ANY, &why);
    if (v == NULL && json_error_code(&why) == json_error_out_of_memory)
        err_nomem(err);
    else if (v == NULL)
        err_set(err, ERR_INVALID, "it is not JSON: %s (character %d)", why.text, why.column);
    return v;
}

static int read_object(struct dataset *d, const char *text, size_t len, struct err *err)
{
    struct form f = { 0 };
    json_t *v = parse(text, len, err);
    int rc = v ? form_read(v, &f, err) : (int)err->code;
    if (rc == ERR_OK && d->r.m.base != NULL)
        rc = f.messages ? reader_chat(&d->r, &f, err) : reader_text(&d->r, &f, err);
    form_free(&f);
    json_decref(v);
    return rc;
}

static int object(struct dataset *d, uint64_t line, const char *text, size_t len, struct err *err)
{
    struct err why = { 0 };
    struct set_mark mark = { 0 };
    const struct dataset_report before = d->rep;
    if (d->r.m.base != NULL)
        mark = set_maker_mark(&d->r.maker);
    const int rc = read_object(d, text, len, &why);
    if (rc == ERR_OK) {
        d->rep.lines++;
        return ERR_OK;
    }
    if (rc == ERR_NOMEM || d->r.broken)
        return err_set(err, rc, "line %llu: %s", (unsigned long long)line, why.msg);
    d->rep = before; /* all or nothing of a line */
    if (d->r.m.base != NULL)
        set_maker_back(&d->r.maker, &mark);
    return bad_line(d, line, why.msg, err);
}

/* What is gathered of an object is all of it now. */
static int gathered(struct dataset *d, uint64_t line, struct err *err)
{
    int rc;
    if (d->too_long) {
        char why[80];
        snprintf(why, sizeof why, "it is longer than %zu bytes", d->max_line);
        rc = bad_line(d, line, why, err);
    } else {
        rc = object(d, line, d->text.data ? d->text.data : "", d->text.len, err);
    }
    d->too_long = false;
    buf_free(&d->text);
    return rc;
}

static int gather(struct dataset *d, const char *s, size_t n, struct err *err)
{
    const int rc = d->too_long ? ERR_OK : buf_add(&d->text, s, n);
    if (rc != ERR_TOO_LARGE)
        return rc == ERR_OK ? ERR_OK : err_nomem(err);
    d->too_long = true;
    buf_free(&d->text);
    return ERR_OK;
}

/* --- lines ---------------------------------------------------------------------------------------------- */

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

static bool is_blank(const char *s, size_t n)
{
    while (n > 0 && is_space(s[n - 1]))
        n--;
    return n == 0;
}

static int end_line(struct dataset *d, struct err *err)
{
    int rc = ERR_OK;
    if (d->too_long || !is_blank(d->text.data, d->text.len))
        rc = gathered(d, d->line, err);
    else
        buf_free(&d->text);
    d->line++;
    return rc;
}

/* Takes what belongs to lines; *used bytes of it. */
static int feed_lines(struct dataset *d, const char *s, size_t len, size_t *used, struct err *err)
{
    const char *nl = memchr(s, '\n', len);
    const size_t n = nl ? (size_t)(nl - s) : len;
    *used = nl ? n + 1 : n;
    if (nl != NULL && d->text.len == 0 && !d->too_long && n <= d->max_line) {
        int rc = is_blank(s, n) ? ERR_OK : object(d, d->line, s, n, err);
        d->line++;
        return rc;
    }
    int rc = gather(d, s, n, err);
    if (rc == ERR_OK && nl != NULL)
        rc = end_line(d, err);
    return rc;
}

/* --- an array ------------------------------------------------------------------------------------------- */

/* Is this byte the end of the element that is being gathered?  Keeps track of strings and brackets. */
static bool ends_element(struct dataset *d, char c)
{
    if (d->in_string) {
        d->in_string = c != '"' || d->escaped;
        d->escaped = c == '\\' && !d->escaped;
        return false;
    }
    if (d->depth == 0 && (c == ',' || c == ']'))
        return true;
    d->in_string = c == '"';
    d->escaped = false;
    if (c == '{' || c == '[')
        d->depth++;
    else if ((c == '}' || c == ']') && d->depth > 0)
        d->depth--;
    return false;
}

static int end_element(struct dataset *d, char c, struct err *err)
{
    const bool empty = d->text.len == 0 && !d->too_long;
    int rc = ERR_OK;
    if (!empty)
        rc = gathered(d, d->begun, err);
    else if (c == ',' || d->after_comma)
        rc = bad_line(d, d->line, "an element of the array is missing", err);
    d->after_comma = c == ',';
    d->where = c == ']' ? BEHIND_ARRAY : IN_ARRAY;
    return rc;
}

static int feed_array(struct dataset *d, const char *s, size_t len, size_t *used, struct err *err)
{
    size_t from = 0, i = 0;
    bool inside = d->text.len > 0 || d->too_long;
    for (; i < len; i++) {
        if (!inside && is_space(s[i])) {
            d->line += s[i] == '\n';
            from = i + 1;
            continue;
        }
        if (!inside) {
            d->begun = d->line;
            inside = true;
        }
        if (ends_element(d, s[i]))
            break;
        d->line += s[i] == '\n';
    }
    int rc = gather(d, s + from, i - from, err);
    *used = i;
    if (rc == ERR_OK && i < len) {
        *used = i + 1;
        rc = end_element(d, s[i], err);
    }
    return rc;
}

static int feed_behind(struct dataset *d, const char *s, size_t len, size_t *used, struct err *err)
{
    size_t i = 0;
    while (i < len && is_space(s[i]))
        d->line += s[i++] == '\n';
    *used = i;
    if (i == len)
        return ERR_OK;
    *used = len;
    d->where = GIVEN_UP;
    return bad_line(d, d->line, "there is something behind the end of the array", err);
}

/* --- the beginning --------------------------------------------------------------------------------------- */

/* Up to the first byte that is no white space; a byte order mark may come before it. */
static int feed_start(struct dataset *d, const char *s, size_t len, size_t *used, struct err *err)
{
    static const char bom[] = "\xef\xbb\xbf";
    size_t i = 0;
    while (i < len && d->bom < 3 && s[i] == bom[d->bom])
        d->bom++, i++;
    *used = i;
    if (i == len)
        return ERR_OK;
    if (d->bom > 0 && d->bom < 3) { /* no mark: back into the text */
        d->where = IN_LINES;
        return gather(d, bom, d->bom, err);
    }
    d->bom = 3;
    if (d->line == 1 && (s[i] == '\xff' || s[i] == '\xfe')) {
        *used = len;
        d->where = GIVEN_UP;
        return bad_line(d, 1, "the file is not UTF-8 text (it looks like UTF-16)", err);
    }
    while (i < len && is_space(s[i]))
        d->line += s[i++] == '\n';
    *used = i;
    if (i < len) {
        d->where = s[i] == '[' ? IN_ARRAY : IN_LINES;
        *used = s[i] == '[' ? i + 1 : i;
    }
    return ERR_OK;
}

/* --- the whole ---------------------------------------------------------------------------------------------- */

int dataset_open(const struct dataset_model *m, const struct dataset_opts *o, struct dataset **ret,
                 struct err *err)
{
    static const struct dataset_opts defaults = { 0 };
    struct dataset *d = calloc(1, sizeof *d);
    if (d == NULL)
        return err_nomem(err);
    if (o == NULL)
        o = &defaults;
    d->line = 1;
    d->max_line = o->max_line ? o->max_line : DATASET_MAX_LINE;
    buf_init(&d->text, d->max_line);
    d->r.o = *o;
    int rc = m != NULL ? reader_init(&d->r, m, o, &d->rep, err) : ERR_OK;
    if (rc != ERR_OK) {
        dataset_abort(d);
        return rc;
    }
    *ret = d;
    return ERR_OK;
}

void dataset_abort(struct dataset *d)
{
    if (d == NULL)
        return;
    reader_free(&d->r);
    buf_free(&d->text);
    dataset_report_free(&d->rep);
    free(d);
}

int dataset_feed(struct dataset *d, const void *data, size_t len, struct err *err)
{
    const char *s = data;
    int rc = ERR_OK;
    while (len > 0 && rc == ERR_OK) {
        size_t used = len;
        switch (d->where) {
        case AT_START: rc = feed_start(d, s, len, &used, err); break;
        case IN_LINES: rc = feed_lines(d, s, len, &used, err); break;
        case IN_ARRAY: rc = feed_array(d, s, len, &used, err); break;
        case BEHIND_ARRAY: rc = feed_behind(d, s, len, &used, err); break;
        case GIVEN_UP: break;
        }
        s += used;
        len -= used;
    }
    return rc;
}

/* The file has ended: what was gathered is all there is of it. */
static int finish(struct dataset *d, struct err *err)
{
    if (d->where == AT_START && d->bom > 0 && d->bom < 3)
        return bad_line(d, 1, "the file is not UTF-8 text", err);
    if (d->where == IN_LINES)
        return end_line(d, err);
    if (d->where == IN_ARRAY)
        return bad_line(d, d->text.len > 0 || d->too_long ? d->begun : d->line,
                        "the file ends inside the array", err);
    return ERR_OK;
}

static int verdict(const struct dataset *d, struct err *err)
{
    const struct dataset_report *r = &d->rep;
    const unsigned long long bad = r->bad_lines, first = r->nbad > 0 ? r->bad[0].line : 0;
    if (bad > 0 && !d->r.o.skip_bad)
        return bad == 1 ? err_set(err, ERR_INVALID, "line %llu: %s", first, r->bad[0].why)
                        : err_set(err, ERR_INVALID, "%llu lines are unusable; the first is line "
                                  "%llu: %s", bad, first, r->bad[0].why);
    if (r->lines == 0)
        return err_set(err, ERR_INVALID, "there is nothing in the data");
    if (r->lines == bad)
        return err_set(err, ERR_INVALID, "no line can be learned from; the first is line %llu: %s",
                       first, r->bad[0].why);
    if (d->r.m.base != NULL && d->r.maker.set->n == 0)
        return err_set(err, ERR_INVALID, "nothing is left to learn: prompts alone are longer than %d "
                       "tokens", d->r.o.max_length);
    return ERR_OK;
}

int dataset_end(struct dataset *d, struct dataset_report *rep, struct train_set **ret,
                struct err *err)
{
    int rc = finish(d, err);
    if (rc == ERR_OK)
        rc = verdict(d, err);
    if (d->r.maker.set != NULL) {
        d->rep.examples = d->r.maker.set->n;
        d->rep.tokens = d->r.maker.set->tokens;
        d->rep.targets = d->r.maker.set->targets;
    }
    if (rep != NULL) {
        *rep = d->rep;
        d->rep.bad = NULL;
    }
    if (rc == ERR_OK && ret != NULL && d->r.m.base != NULL)
        *ret = set_maker_take(&d->r.maker);
    dataset_abort(d);
    return rc;
}

/* --- a file ---------------------------------------------------------------------------------------------------- */

static int feed_fd(struct dataset *d, int fd, const char *path, dataset_stop_fn stop, void *ud,
                   struct err *err)
{
    enum { PIECE = 1 << 18 };
    struct stat st;
    uint64_t done = 0;
    int rc = ERR_OK;
    char *piece = malloc(PIECE);
    if (piece == NULL)
        return err_nomem(err);
    const uint64_t total = fstat(fd, &st) == 0 && st.st_size > 0 ? (uint64_t)st.st_size : 0;
    for (;;) {
        const ssize_t n = read(fd, piece, PIECE);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            rc = err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
        if (n <= 0 || rc != ERR_OK)
            break;
        rc = dataset_feed(d, piece, (size_t)n, err);
        done += (uint64_t)n;
        if (rc == ERR_OK && stop != NULL && stop(ud, done, total > done ? total : done))
            rc = err_set(err, ERR_CANCELLED, "%s: reading was stopped", path);
        if (rc != ERR_OK)
            break;
    }
    free(piece);
    return rc;
}

int dataset_read(const struct dataset_model *m, const char *path, const struct dataset_opts *o,
                 dataset_stop_fn stop, void *ud, struct dataset_report *rep,
                 struct train_set **ret, struct err *err)
{
    struct dataset *d = NULL;
    if (rep != NULL)
        *rep = (struct dataset_report){ 0 };
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    int rc = dataset_open(m, o, &d, err);
    if (rc == ERR_OK)
        rc = feed_fd(d, fd, path, stop, ud, err);
    close(fd);
    if (rc == ERR_OK)
        return dataset_end(d, rep, ret, err);
    dataset_abort(d);
    return rc;
}
