/* tok_charsmap.c - the normaliser "Precompiled": the table that a SentencePiece model carries.
 *
 * The file has it in base64: the size of a trie in bytes (u32, little-endian), the trie (a double
 * array of u32), and texts that end with NUL.  Bits of a unit of the trie: 0-7 the byte that leads
 * to it and 31 zero; 8 a value follows; 9 the offset is in steps of 256; 10-31 the offset.  From a
 * unit at p, which has its children at p ^ offset = base, byte c leads to base ^ c, and the value
 * (bits 0-30: the place of a text) lies at base itself.
 *
 * All that can be reached is checked when the file is read, so looking up needs no checks.
 *
 * What is replaced is SentencePiece's choice in files that were made of a model of its own: the text of
 * the longest prefix that is in the table, at each place.  In others it is the reference's choice: clusters of characters of less than six bytes as a
 * whole, by the text of the SHORTEST prefix that is in the table; all others character by
 * character. */
#include "engine/tokenizer_int.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { MAX_UNITS = 1 << 20 }; /* sixteen times the largest in use */

/* --- the trie ---------------------------------------------------------------------------- */
static uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 1u << 9) >> 6); }

/* Where byte c (not 0) leads from the unit at *base's children; false: nowhere. */
static bool step(const uint32_t *trie, uint8_t c, uint32_t *base, bool *value)
{
    uint32_t at = *base ^ c, unit = trie[at];
    if ((unit & (1u << 31 | 0xff)) != c)
        return false;
    *base = at ^ offset(unit);
    *value = unit >> 8 & 1;
    return true;
}

/* The longest prefix in the table, *ret_n bytes; NULL: there is none. */
static const char *lookup_longest(const struct tok_norm *st, const char *s, size_t len, size_t *ret_n)
{
    uint32_t base = offset(st->trie[0]);
    const char *text = NULL;
    bool value = false;
    for (size_t i = 0; i < len && s[i] != '\0'; i++) {
        if (!step(st->trie, (uint8_t)s[i], &base, &value))
            break;
        if (value) {
            text = st->text + (st->trie[base] & 0x7fffffff);
            *ret_n = i + 1;
        }
    }
    return text;
}

/* The shortest. */
static const char *lookup(const struct tok_norm *st, const char *s, size_t len)
{
    uint32_t base = offset(st->trie[0]);
    bool value = false;
    for (size_t i = 0; i < len && s[i] != '\0'; i++) {
        if (!step(st->trie, (uint8_t)s[i], &base, &value))
            return NULL;
        if (value)
            return st->text + (st->trie[base] & 0x7fffffff);
    }
    return NULL;
}

/* --- reading ----------------------------------------------------------------------------- */
static int bad(struct err *err) { return tok_bad(err, "the precompiled_charsmap is damaged"); }

/* Are all of base's children, and its value, inside? */
static bool check_base(const struct tok_norm *st, uint32_t base, bool value)
{
    if ((base | 0xff) >= st->ntrie)
        return false;
    if (!value)
        return true;
    uint32_t at = st->trie[base] & 0x7fffffff;
    return at <= st->text_len && (st->text[at] & 0xc0) != 0x80;
}

/* Visit every base that can be reached, each once for its children. */
static int check_trie(const struct tok_norm *st, struct err *err)
{
    uint32_t *todo = calloc(st->ntrie, sizeof *todo);
    uint8_t *seen = calloc(st->ntrie, 1);
    size_t n = 0;
    bool good = todo != NULL && seen != NULL && check_base(st, offset(st->trie[0]), false);
    if (good) {
        todo[n++] = offset(st->trie[0]);
        seen[todo[0]] = 1;
    }
    while (good && n > 0) {
        uint32_t from = todo[--n];
        for (int c = 1; good && c < 256; c++) {
            uint32_t base = from;
            bool value = false;
            if (!step(st->trie, (uint8_t)c, &base, &value))
                continue;
            good = check_base(st, base, value);
            if (good && !seen[base]) {
                seen[base] = 1;
                todo[n++] = base;
            }
        }
    }
    int rc = todo == NULL || seen == NULL ? err_nomem(err) : good ? ERR_OK : bad(err);
    free(todo);
    free(seen);
    return rc;
}

static uint32_t u32(const unsigned char *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static int parse(struct tok_norm *st, const unsigned char *data, size_t len, struct err *err)
{
    uint32_t size = len >= 4 ? u32(data) : 0;
    if (size < 4 || size % 4 != 0 || size > len - 4 || size / 4 > MAX_UNITS)
        return bad(err);
    st->ntrie = size / 4;
    st->text_len = len - 4 - size;
    st->trie = calloc(st->ntrie, sizeof *st->trie);
    st->text = calloc(st->text_len + 1, 1);
    if (st->trie == NULL || st->text == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < st->ntrie; i++)
        st->trie[i] = u32(data + 4 + 4 * i);
    memcpy(st->text, data + 4 + size, st->text_len);
    for (size_t i = 0; i < st->text_len;) {
        int n = tok_utf8(st->text + i, st->text_len - i);
        if (n <= 0)
            return bad(err);
        i += (size_t)n;
    }
    return check_trie(st, err);
}

int tok_charsmap_read(struct tok_norm *st, const char *text, size_t len, struct err *err)
{
    size_t n = 0;
    unsigned char *data = malloc(len / 4 * 3 + 4);
    if (data == NULL)
        return err_nomem(err);
    int rc = sodium_base642bin(data, len / 4 * 3 + 4, text, len, NULL, &n, NULL,
                               sodium_base64_VARIANT_ORIGINAL) == 0
                 ? parse(st, data, n, err)
                 : tok_bad(err, "the precompiled_charsmap is not base64");
    free(data);
    return rc;
}

/* --- normalising ------------------------------------------------------------------------- */
/* Length of the cluster that s[len] begins with. */
static size_t cluster(const char *s, size_t len)
{
    if ((uint8_t)s[0] < 0x80 && s[0] != '\r' && (len == 1 || (uint8_t)s[1] < 0x80))
        return 1;
    utf8proc_int32_t state = 0;
    size_t at = (size_t)tok_utf8(s, len);
    int32_t before = (int32_t)tok_codepoint(s, (int)at);
    while (at < len) {
        int n = tok_utf8(s + at, len - at);
        int32_t c = (int32_t)tok_codepoint(s + at, n);
        if (utf8proc_grapheme_break_stateful(before, c, &state))
            break;
        at += (size_t)n;
        before = c;
    }
    return at;
}

/* How much of the output comes from the first character, now that `text` has replaced the n bytes
 * of the input that end at `done`.  *first is the same for the input.  As the reference counts,
 * characters that vanish at the very beginning leave their place to the next one, and of what
 * replaces several only the first character comes from the first. */
static size_t moved_origin(const char *s, size_t len, size_t done, const char *text, size_t n,
                           size_t out_len, size_t *first, size_t made)
{
    if (*first > 0 && out_len == 0) {
        *first = done < len ? done + (size_t)tok_utf8(s + done, len - done) : done;
        return *first - done;
    }
    if (done - n >= *first) /* behind it */
        return made;
    if (done > *first)
        return *text == '\0' ? out_len
                             : out_len - strlen(text) + (size_t)tok_utf8(text, strlen(text));
    return out_len + *first - done;
}

/* An entry of the table that ends inside of a character would leave half of it. */
static bool whole_characters(const char *s, size_t len, size_t n)
{
    return n == len || ((uint8_t)s[n] & 0xc0) != 0x80;
}

static int charsmap_longest(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                            size_t *origin, struct err *err)
{
    int rc = ERR_OK;
    size_t first = *origin, made = first, done = 0;
    for (size_t i = 0; rc == ERR_OK && i < len;) {
        size_t n = 0;
        const char *text = lookup_longest(st, s + i, len - i, &n);
        if (text == NULL || !whole_characters(s + i, len - i, n)) {
            i += (size_t)tok_utf8(s + i, len - i);
            continue;
        }
        rc = tok_add(out, s + done, i - done, err);
        if (rc == ERR_OK)
            rc = tok_add(out, text, strlen(text), err);
        done = i += n;
        made = moved_origin(s, len, done, text, n, out->len, &first, made);
    }
    *origin = made;
    return rc == ERR_OK ? tok_add(out, s + done, len - done, err) : rc;
}

int tok_charsmap(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                 size_t *origin, struct err *err)
{
    if (st->longest)
        return charsmap_longest(st, s, len, out, origin, err);
    int rc = ERR_OK;
    size_t first = *origin, made = first;
    size_t done = 0; /* what is not replaced is copied in long runs */
    for (size_t i = 0; rc == ERR_OK && i < len;) {
        size_t whole = cluster(s + i, len - i), n = whole;
        const char *text = whole < 6 ? lookup(st, s + i, whole) : NULL;
        for (size_t at = 0; rc == ERR_OK && at < whole; at += n) {
            if (text == NULL || at > 0) {
                n = (size_t)tok_utf8(s + i + at, whole - at);
                text = lookup(st, s + i + at, n);
            }
            if (text == NULL)
                continue;
            rc = tok_add(out, s + done, i + at - done, err);
            if (rc == ERR_OK)
                rc = tok_add(out, text, strlen(text), err);
            done = i + at + n;
            made = moved_origin(s, len, done, text, n, out->len, &first, made);
        }
        i += whole;
    }
    *origin = made;
    return rc == ERR_OK ? tok_add(out, s + done, len - done, err) : rc;
}
