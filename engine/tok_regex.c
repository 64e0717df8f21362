/* tok_regex.c - patterns of tokenizer.json: Oniguruma's syntax translated for PCRE2, and searching.
 *
 * The reference runs these patterns with Oniguruma in its Ruby syntax.  Where PCRE2 would read the
 * same text differently, translate() rewrites it (\s, \w, \d, \h, \v, \b, scripts, (?m), {,n},
 * options in the middle); where no rewriting is exact, the pattern is refused by name.  What is
 * left is common to both.  Properties of characters are those of PCRE2's Unicode version (14 in
 * Debian 12), so characters that Unicode added later count as unassigned here.
 *
 * A search does not hang: PCRE2 counts its steps at each place where a match could start and gives
 * up with an error, and because that says nothing about the number of places, the CPU time of a
 * call is bounded too.  Sensible patterns stay two orders of magnitude below either limit. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/tokenizer_int.h"

#include <ctype.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    MAX_PATTERN = 64 << 10,
    MAX_DEPTH = 64,
    WINDOW = 256,    /* starting places between two looks at the clock without a match, */
    SEARCHES = 4096, /* and searches between two looks with one */
};

/* Oniguruma's \w; it counts Latin-1's superscripts and fractions in. */
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"

struct tr {
    const char *s, *end;
    struct buf out;
    int extra[MAX_DEPTH]; /* parentheses to close besides the group's own, per depth */
    int depth;
    struct err *err;
};

static int refuse(struct tr *t, const char *what)
{
    return tok_bad(t->err, "pattern \"%.*s\": %s", (int)(t->end - t->s > 100 ? 100 : t->end - t->s),
                   t->s, what);
}

/* Names of properties that are neither scripts nor two-letter categories. */
static const char *property(const char *name)
{
    static const struct {
        const char *onig, *pcre;
    } names[] = {
        { "any", "Any" },
        { "alphabetic", "Alphabetic" },
        { "uppercase", "Uppercase" },
        { "lowercase", "Lowercase" },
        { "whitespace", "White_Space" },
        { "ideographic", "Ideographic" },
        { "emoji", "Emoji" },
        { "emojipresentation", "Emoji_Presentation" },
        { "extendedpictographic", "Extended_Pictographic" },
        { "letter", "L" },
        { "uppercaseletter", "Lu" },
        { "lowercaseletter", "Ll" },
        { "titlecaseletter", "Lt" },
        { "modifierletter", "Lm" },
        { "otherletter", "Lo" },
        { "mark", "M" },
        { "combiningmark", "M" },
        { "nonspacingmark", "Mn" },
        { "spacingmark", "Mc" },
        { "enclosingmark", "Me" },
        { "number", "N" },
        { "decimalnumber", "Nd" },
        { "letternumber", "Nl" },
        { "othernumber", "No" },
        { "punctuation", "P" },
        { "connectorpunctuation", "Pc" },
        { "dashpunctuation", "Pd" },
        { "openpunctuation", "Ps" },
        { "closepunctuation", "Pe" },
        { "initialpunctuation", "Pi" },
        { "finalpunctuation", "Pf" },
        { "otherpunctuation", "Po" },
        { "symbol", "S" },
        { "mathsymbol", "Sm" },
        { "currencysymbol", "Sc" },
        { "modifiersymbol", "Sk" },
        { "othersymbol", "So" },
        { "separator", "Z" },
        { "spaceseparator", "Zs" },
        { "lineseparator", "Zl" },
        { "paragraphseparator", "Zp" },
        { "other", "C" },
        { "control", "Cc" },
        { "format", "Cf" },
        { "privateuse", "Co" },
        { "unassigned", "Cn" },
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i].onig) == 0)
            return names[i].pcre;
    return NULL;
}

/* \p{...} and \P{...}; t->s is at the letter.  A script means the Script property in Oniguruma and
 * its extensions in PCRE2 unless one says `sc:`. */
static int translate_property(struct tr *t)
{
    char letter = t->s[0];
    const char *p = t->s + 1;
    if (p == t->end || *p != '{')
        return refuse(t, "\\p without braces is not supported");
    p++;
    bool negated = p < t->end && *p == '^';
    if (negated)
        p++;
    char raw[64], name[64];
    size_t nraw = 0, n = 0;
    for (; p < t->end && *p != '}'; p++) {
        if (nraw + 1 == sizeof raw ||
            !(isalnum((unsigned char)*p) || *p == '_' || *p == ' ' || *p == '-'))
            return refuse(t, "this property is not known");
        raw[nraw++] = *p;
        if (isalnum((unsigned char)*p))
            name[n++] = (char)tolower((unsigned char)*p);
    }
    raw[nraw] = name[n] = '\0';
    if (p == t->end || n == 0)
        return refuse(t, "the property is not closed");
    t->s = p + 1;
    const char *known = property(name);
    return buf_printf(&t->out, "\\%c{%s%s%s}", letter, negated ? "^" : "",
                      known == NULL && n > 2 ? "sc:" : "", known != NULL ? known : raw);
}

static int hex_digit(char c)
{
    return isxdigit((unsigned char)c) ? isdigit((unsigned char)c) ? c - '0' : (c | 32) - 'a' + 10
                                      : -1;
}

/* \uHHHH and \xHH: t->s is at the letter. */
static int translate_hex(struct tr *t, int digits)
{
    if (digits == 2 && t->end - t->s > 1 && t->s[1] == '{') {
        const char *close = memchr(t->s, '}', (size_t)(t->end - t->s));
        if (close == NULL)
            return refuse(t, "the code is not closed");
        int rc = buf_puts(&t->out, "\\");
        if (rc == ERR_OK)
            rc = buf_add(&t->out, t->s, (size_t)(close + 1 - t->s));
        t->s = close + 1;
        return rc;
    }
    unsigned v = 0;
    for (int i = 1; i <= digits; i++) {
        if (t->end - t->s <= i || hex_digit(t->s[i]) < 0)
            return refuse(t, "a code needs all its digits");
        v = v * 16 + (unsigned)hex_digit(t->s[i]);
    }
    if (digits == 2 && v > 127)
        return refuse(t, "\\x above 7f means a byte, not a character");
    t->s += digits + 1;
    return buf_printf(&t->out, "\\x{%x}", v);
}

/* After a backslash; t->s is at the character it escapes. */
static int translate_escape(struct tr *t, bool in_class)
{
    if (t->s == t->end)
        return refuse(t, "it ends with a backslash");
    static const struct {
        char letter;
        const char *outside, *inside;
    } plain[] = {
        { 's', "\\p{White_Space}", "\\p{White_Space}" },
        { 'S', "\\P{White_Space}", "\\P{White_Space}" },
        { 'w', "[" WORD "]", WORD },
        { 'W', "[^" WORD "]", NULL },
        { 'd', "\\p{Nd}", "\\p{Nd}" },
        { 'D', "\\P{Nd}", "\\P{Nd}" },
        { 'h', "[0-9A-Fa-f]", "0-9A-Fa-f" },
        { 'H', "[^0-9A-Fa-f]", NULL },
        { 'v', "\\x{b}", "\\x{b}" },
        { 'b', "(?:(?<=[" WORD "])(?![" WORD "])|(?<![" WORD "])(?=[" WORD "]))", "\\x{8}" },
        { 'B', "(?:(?<=[" WORD "])(?=[" WORD "])|(?<![" WORD "])(?![" WORD "]))", NULL },
        { 'n', "\\n", "\\n" },
        { 'r', "\\r", "\\r" },
        { 't', "\\t", "\\t" },
        { 'f', "\\f", "\\f" },
        { 'a', "\\a", "\\a" },
        { 'e', "\\e", "\\e" },
        { 'A', "\\A", NULL },
        { 'z', "\\z", NULL },
        { 'Z', "\\Z", NULL },
    };
    char c = *t->s;
    if (c == 'p' || c == 'P')
        return translate_property(t);
    if (c == 'u' || c == 'x')
        return translate_hex(t, c == 'u' ? 4 : 2);
    if (c >= '1' && c <= '9' && !in_class) { /* back reference */
        t->s++;
        return buf_printf(&t->out, "\\g{%c}", c);
    }
    for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++)
        if (c == plain[i].letter) {
            const char *text = in_class ? plain[i].inside : plain[i].outside;
            if (text == NULL)
                return refuse(t, "this escape is not supported inside a class");
            t->s++;
            return buf_puts(&t->out, text);
        }
    if (isalnum((unsigned char)c))
        return refuse(t, "this escape is not supported");
    int rc = buf_puts(&t->out, "\\");
    if (rc == ERR_OK)
        rc = buf_add(&t->out, t->s, 1);
    t->s++;
    return rc;
}

/* [...]; t->s is behind the bracket.  Oniguruma's classes nest and intersect, PCRE2's do not. */
static int translate_class(struct tr *t)
{
    int rc = buf_puts(&t->out, "[");
    if (rc == ERR_OK && t->s < t->end && *t->s == '^') {
        rc = buf_puts(&t->out, "^");
        t->s++;
    }
    if (t->s < t->end && *t->s == ']')
        return refuse(t, "a class cannot begin with its bracket");
    while (rc == ERR_OK && t->s < t->end && *t->s != ']') {
        if (*t->s == '\\') {
            t->s++;
            rc = translate_escape(t, true);
        } else if (*t->s == '[') {
            return refuse(t, "classes inside classes are not supported");
        } else if (t->end - t->s > 1 && t->s[0] == '&' && t->s[1] == '&') {
            return refuse(t, "intersections of classes are not supported");
        } else {
            rc = buf_add(&t->out, t->s++, 1);
        }
    }
    if (rc != ERR_OK)
        return rc;
    if (t->s == t->end)
        return refuse(t, "a class is not closed");
    t->s++;
    return buf_puts(&t->out, "]");
}

/* (?imx-imx) and (?imx-imx:...): Oniguruma's m is PCRE2's s, and an option without a colon opens
 * a group that reaches to the end of the enclosing one, alternatives included. */
static int translate_options(struct tr *t)
{
    int rc = buf_puts(&t->out, "(?");
    for (t->s += 2; rc == ERR_OK && t->s < t->end; t->s++) {
        char c = *t->s;
        if (c == ':') {
            t->depth++;
            t->extra[t->depth] = 0;
            t->s++;
            return buf_puts(&t->out, ":");
        }
        if (c == ')') {
            t->extra[t->depth]++;
            t->s++;
            return buf_puts(&t->out, ":");
        }
        if (c != 'i' && c != 'm' && c != '-')
            return refuse(t, "this group option is not supported");
        rc = buf_add(&t->out, c == 'm' ? "s" : &c, 1);
    }
    return rc != ERR_OK ? rc : refuse(t, "a group is not closed");
}

/* t->s is at the opening parenthesis. */
static int translate_open(struct tr *t)
{
    if (t->depth + 1 >= MAX_DEPTH)
        return refuse(t, "groups are nested too deeply");
    size_t left = (size_t)(t->end - t->s);
    if (left > 1 && t->s[1] == '*')
        return refuse(t, "verbs are not supported");
    if (left > 2 && t->s[1] == '?' && strchr(":=!><", t->s[2]) == NULL)
        return translate_options(t);
    size_t n = 1;
    if (left > 2 && t->s[1] == '?') {
        n = 3;
        if (t->s[2] == '<' && left > 3 && (t->s[3] == '=' || t->s[3] == '!'))
            n = 4;
    }
    int rc = buf_add(&t->out, t->s, n);
    t->s += n;
    t->depth++;
    t->extra[t->depth] = 0;
    return rc;
}

static int translate_close(struct tr *t)
{
    if (t->depth == 0)
        return refuse(t, "a parenthesis too many");
    int rc = ERR_OK;
    for (int i = 0; rc == ERR_OK && i <= t->extra[t->depth]; i++)
        rc = buf_puts(&t->out, ")");
    t->depth--;
    t->s++;
    return rc;
}

/* A brace: {n}, {n,}, {n,m} and {,m} repeat, anything else is itself. */
static int translate_brace(struct tr *t)
{
    const char *p = t->s + 1, *first = p;
    while (p < t->end && isdigit((unsigned char)*p))
        p++;
    bool low = p > first, comma = p < t->end && *p == ',', high = false;
    if (comma) {
        const char *second = ++p;
        while (p < t->end && isdigit((unsigned char)*p))
            p++;
        high = p > second;
    }
    if (p == t->end || *p != '}' || !(low || (comma && high))) {
        t->s++;
        return buf_puts(&t->out, "\\{");
    }
    p++;
    if (p < t->end && (*p == '+' || (*p == '?' && !comma)))
        return refuse(t, "this repetition means different things in different engines");
    int rc = buf_puts(&t->out, low ? "{" : "{0");
    if (rc == ERR_OK)
        rc = buf_add(&t->out, first, (size_t)(p - first));
    t->s = p;
    return rc;
}

static int translate(struct tr *t)
{
    int rc = ERR_OK;
    while (rc == ERR_OK && t->s < t->end) {
        switch (*t->s) {
        case '\\':
            t->s++;
            rc = translate_escape(t, false);
            break;
        case '[':
            t->s++;
            rc = translate_class(t);
            break;
        case '(':
            rc = translate_open(t);
            break;
        case ')':
            rc = translate_close(t);
            break;
        case '{':
            rc = translate_brace(t);
            break;
        case '\0':
            rc = refuse(t, "a NUL byte in a pattern");
            break;
        default:
            rc = buf_add(&t->out, t->s++, 1);
        }
    }
    if (rc == ERR_OK && t->depth > 0)
        return refuse(t, "a group is not closed");
    for (int i = 0; rc == ERR_OK && i < t->extra[0]; i++)
        rc = buf_puts(&t->out, ")");
    return rc;
}

/* --- compiling --------------------------------------------------------------------------- */
static int compile(struct tok_pattern *p, const char *s, const char *shown, struct err *err)
{
    int rc = ERR_OK, code = 0;
    size_t at = 0;
    pcre2_compile_context *ctx = pcre2_compile_context_create(NULL);
    if (ctx == NULL)
        return err_nomem(err);
    pcre2_set_newline(ctx, PCRE2_NEWLINE_LF);
    const uint32_t options =
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_USE_OFFSET_LIMIT;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)s, PCRE2_ZERO_TERMINATED, options, &code, &at, ctx);
    pcre2_compile_context_free(ctx);
    if (re == NULL) {
        char why[160];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        rc = tok_bad(err, "pattern \"%.100s\": %s", shown, why);
    } else {
        pcre2_jit_compile(re, PCRE2_JIT_COMPLETE); /* without it, merely slower */
        p->code = re;
    }
    return rc;
}

int tok_pattern_pcre(struct tok_pattern *p, const char *s, struct err *err)
{
    return compile(p, s, s, err);
}

int tok_pattern_onig(struct tok_pattern *p, const char *s, size_t len, struct err *err)
{
    if (len > MAX_PATTERN)
        return tok_bad(err, "a pattern of %zu bytes, at most %d are read", len, MAX_PATTERN);
    struct tr t = { .s = s, .end = s + len, .err = err };
    buf_init(&t.out, 64 * MAX_PATTERN);
    int rc = translate(&t);
    if (rc == ERR_OK)
        rc = buf_puts(&t.out, ""); /* an empty pattern is a string too */
    if (rc == ERR_NOMEM)
        err_nomem(err);
    else if (rc != ERR_OK)
        err_set(err, rc, "tokenizer.json: pattern \"%.100s\" is too long", s);
    if (rc == ERR_OK)
        rc = compile(p, t.out.data, s, err);
    buf_free(&t.out);
    return rc;
}

int tok_pattern_literal(struct tok_pattern *p, const char *s, size_t len, struct err *err)
{
    if (len == 0)
        return tok_bad(err, "a pattern is the empty string");
    p->literal = malloc(len);
    if (p->literal == NULL)
        return err_nomem(err);
    memcpy(p->literal, s, len);
    p->len = len;
    return ERR_OK;
}

void tok_pattern_free(struct tok_pattern *p)
{
    free(p->literal);
    pcre2_code_free(p->code);
    *p = (struct tok_pattern){ 0 };
}

/* --- searching --------------------------------------------------------------------------- */
struct tok_match {
    pcre2_match_data *data;
    pcre2_match_context *ctx;
    double began; /* CPU time of this thread */
    int searches; /* since the last look at the clock */
};

static double cpu_time(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void tok_match_free(struct tok_match *m)
{
    if (m == NULL)
        return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->ctx);
    free(m);
}

static struct tok_match *match_new(void)
{
    struct tok_match *m = calloc(1, sizeof *m);
    if (m == NULL)
        return NULL;
    m->data = pcre2_match_data_create(1, NULL);
    m->ctx = pcre2_match_context_create(NULL);
    m->began = cpu_time();
    if (m->data != NULL && m->ctx != NULL)
        return m;
    tok_match_free(m);
    return NULL;
}

static int find_literal(const struct tok_scan *s, size_t *start, size_t *end)
{
    const char *from = s->text + s->at;
    const char *hit = s->p->len == 1 ? memchr(from, s->p->literal[0], s->len - s->at)
                                     : memmem(from, s->len - s->at, s->p->literal, s->p->len);
    if (hit == NULL)
        return 0;
    *start = (size_t)(hit - s->text);
    *end = *start + s->p->len;
    return 1;
}

/* One second and one microsecond per byte: a hundred times what sensible patterns take. */
static bool out_of_time(struct tok_match *m, size_t len)
{
    m->searches = 0;
    return cpu_time() - m->began > 1 + 1e-6 * (double)len;
}

/* PCRE2's result for a match that starts in [from, last]. */
static int match_in(const struct tok_scan *s, struct tok_match *m, size_t from, size_t last)
{
    PCRE2_SPTR text = (PCRE2_SPTR)s->text;
    pcre2_set_offset_limit(m->ctx, last);
    int n = pcre2_match(s->p->code, text, s->len, from, PCRE2_NO_UTF_CHECK, m->data, m->ctx);
    if (n == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter's stack is the heap */
        n = pcre2_match(s->p->code, text, s->len, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data,
                        m->ctx);
    return n;
}

static int gave_up(const char *why, struct err *err)
{
    err_set(err, ERR_INVALID, "the tokenizer's pattern gave up on this text: %s", why);
    return -1;
}

/* Where the pattern matches at or after s->at: 1, 0 or -1. */
static int search(struct tok_scan *s, size_t *start, size_t *end, struct err *err)
{
    if (s->p->literal != NULL)
        return find_literal(s, start, end);
    if (*s->mem == NULL && (*s->mem = match_new()) == NULL) {
        err_nomem(err);
        return -1;
    }
    struct tok_match *m = *s->mem;
    const uint64_t steps = 100000 + 8 * (uint64_t)s->len;
    pcre2_set_match_limit(m->ctx, steps > UINT32_MAX ? UINT32_MAX : (uint32_t)steps);
    int n = PCRE2_ERROR_NOMATCH;
    for (size_t from = s->at; n == PCRE2_ERROR_NOMATCH && from <= s->len;) {
        size_t last = s->len - from > WINDOW ? from + WINDOW : s->len;
        while (last < s->len && (s->text[last] & 0xc0) == 0x80)
            last++;
        n = match_in(s, m, from, last);
        if ((n == PCRE2_ERROR_NOMATCH || ++m->searches == SEARCHES) && last < s->len &&
            out_of_time(m, s->len))
            return gave_up("it takes too long", err);
        from = last + 1;
        while (from < s->len && (s->text[from] & 0xc0) == 0x80)
            from++;
    }
    if (n == PCRE2_ERROR_NOMATCH)
        return 0;
    if (n < 0) {
        char why[160];
        pcre2_get_error_message(n, (PCRE2_UCHAR *)why, sizeof why);
        return gave_up(why, err);
    }
    const size_t *o = pcre2_get_ovector_pointer(m->data);
    *start = o[0];
    *end = o[1] < o[0] ? o[0] : o[1];
    return 1;
}

int tok_scan_next(struct tok_scan *s, size_t *start, size_t *end, struct err *err)
{
    while (s->len > 0 && s->at <= s->len) {
        int found = search(s, start, end, err);
        if (found <= 0)
            return found;
        if (*start < *end || !s->matched || s->last_end != *end) {
            s->at = s->last_end = *end;
            s->matched = true;
            return 1;
        }
        int n = s->at < s->len ? tok_utf8(s->text + s->at, s->len - s->at) : 1;
        s->at += n > 0 ? (size_t)n : 1;
    }
    return 0;
}
