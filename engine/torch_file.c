/* torch_file.c - the zip archive around a pickled dict of tensors, as a list of tensors.
 *
 * The central directory at the end says where the members are.  Members must be stored as they are,
 * have names that torch.save() gives, and lie before the directory.  Tensors whose elements do not
 * lie in order are put in order in memory of their own. */
#include "engine/torch_file.h"

#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { END_SIZE = 22, ENTRY_SIZE = 46, LOCAL_SIZE = 30, STEM_MAX = 200, KEY_MAX = 64 };

struct member {
    const char *name; /* without the stem */
    size_t name_len;
    const uint8_t *data;
    size_t bytes;
};

struct archive {
    const uint8_t *map;
    size_t len, directory; /* where the directory starts */
    const char *what;
    struct err *err;
    struct member *members; /* ascending by name */
    size_t n;
    const char *stem;
    size_t stem_len;
};

static size_t u16(const uint8_t *p) { return (size_t)(p[0] | p[1] << 8); }
static size_t u32(const uint8_t *p) { return u16(p) | u16(p + 2) << 16; }

static int bad(const struct archive *a, const char *why)
{
    return err_set(a->err, ERR_INVALID, "%s is not an archive as torch.save() writes it: %s", a->what,
                   why);
}

static bool is_text(const char *s, size_t n, const char *want)
{
    return n == strlen(want) && memcmp(s, want, n) == 0;
}

/* --- members ----------------------------------------------------------------------------------- */

static bool is_known(const char *name, size_t n)
{
    static const char *const known[] = { "data.pkl", "byteorder", "version", ".format_version",
                                         ".storage_alignment", ".data/serialization_id" };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (is_text(name, n, known[i]))
            return true;
    return n > 5 && memcmp(name, "data/", 5) == 0 && memchr(name + 5, '/', n - 5) == NULL;
}

/* The member's name, and that it has one that is needed, under the stem that all have. */
static int read_name(struct archive *a, const char *name, size_t n, struct member *m)
{
    const char *slash = memchr(name, '/', n);
    const size_t stem = slash != NULL ? (size_t)(slash - name) : 0;
    if (stem == 0 || stem > STEM_MAX || (a->stem != NULL && (stem != a->stem_len ||
                                                              memcmp(a->stem, name, stem) != 0)))
        return bad(a, "its members do not lie in one folder");
    a->stem = name;
    a->stem_len = stem;
    m->name = slash + 1;
    m->name_len = n - stem - 1;
    if (is_known(m->name, m->name_len))
        return ERR_OK;
    char shown[64];
    size_t i = 0;
    for (; i < m->name_len && i < sizeof shown - 1; i++)
        shown[i] = m->name[i] > 0x20 && m->name[i] < 0x7f ? m->name[i] : '?';
    shown[i] = '\0';
    return err_set(a->err, ERR_INVALID, "%s has a member %s, which is none of a dict of tensors",
                   a->what, shown);
}

/* One entry of the directory at p; *ret_size is its length. */
static int read_entry(struct archive *a, const uint8_t *p, size_t left, struct member *m,
                      size_t *ret_size)
{
    if (left < ENTRY_SIZE || u32(p) != 0x02014b50)
        return bad(a, "its directory is damaged");
    const size_t n = u16(p + 28), at = u32(p + 42), bytes = u32(p + 24);
    *ret_size = ENTRY_SIZE + n + u16(p + 30) + u16(p + 32);
    if (*ret_size > left || n == 0)
        return bad(a, "its directory is damaged");
    if (u16(p + 10) != 0 || (u16(p + 8) & 1) != 0 || u32(p + 20) != bytes)
        return bad(a, "a member is compressed or encrypted");
    if (bytes == 0xffffffff || at == 0xffffffff)
        return bad(a, "a member is larger than 4 GiB");
    int rc = read_name(a, (const char *)p + ENTRY_SIZE, n, m);
    if (rc != ERR_OK)
        return rc;
    if (at > a->directory || a->directory - at < LOCAL_SIZE || u32(a->map + at) != 0x04034b50)
        return bad(a, "a member does not begin where the directory says");
    const uint8_t *local = a->map + at;
    const size_t head = LOCAL_SIZE + u16(local + 26) + u16(local + 28);
    if (u16(local + 26) != n || a->directory - at < head ||
        memcmp(local + LOCAL_SIZE, p + ENTRY_SIZE, n) != 0)
        return bad(a, "a member has another name than the directory says");
    if (a->directory - at - head < bytes)
        return bad(a, "a member ends behind the data (is the file cut off?)");
    m->data = local + head;
    m->bytes = bytes;
    return ERR_OK;
}

static int compare(const char *a, size_t na, const char *b, size_t nb)
{
    const int c = memcmp(a, b, na < nb ? na : nb);
    return c != 0 ? c : (na > nb) - (na < nb);
}

static int by_name(const void *pa, const void *pb)
{
    const struct member *a = pa, *b = pb;
    return compare(a->name, a->name_len, b->name, b->name_len);
}

static const struct member *find(const struct archive *a, const char *name, size_t n)
{
    const struct member key = { .name = name, .name_len = n };
    return a->n > 0 ? bsearch(&key, a->members, a->n, sizeof key, by_name) : NULL;
}

static int read_directory(struct archive *a)
{
    const uint8_t *end = a->len >= END_SIZE ? a->map + a->len - END_SIZE : NULL;
    if (end == NULL || u32(end) != 0x06054b50)
        return bad(a, "it has no directory at its end (is the file cut off?)");
    const size_t n = u16(end + 10), size = u32(end + 12);
    a->directory = u32(end + 16);
    if (n == 0xffff || u16(end + 8) != n || u16(end + 20) != 0 || u32(end + 4) != 0 ||
        a->directory > a->len - END_SIZE || a->len - END_SIZE - a->directory < size)
        return bad(a, "its directory is damaged or has more than 65534 members");
    a->members = calloc(n + 1, sizeof *a->members);
    if (a->members == NULL)
        return err_nomem(a->err);
    size_t at = a->directory, left = size, one = 0;
    for (size_t i = 0; i < n; i++, at += one, left -= one) {
        int rc = read_entry(a, a->map + at, left, &a->members[i], &one);
        if (rc != ERR_OK)
            return rc;
    }
    a->n = n;
    if (n > 0)
        qsort(a->members, n, sizeof *a->members, by_name);
    for (size_t i = 1; i < n; i++)
        if (by_name(&a->members[i - 1], &a->members[i]) == 0)
            return bad(a, "two members have the same name");
    const struct member *order = find(a, "byteorder", 9);
    if (order != NULL && !is_text((const char *)order->data, order->bytes, "little"))
        return bad(a, "its numbers are not little-endian");
    return find(a, "data.pkl", 8) != NULL ? ERR_OK : bad(a, "it has no data.pkl");
}

/* --- tensors ----------------------------------------------------------------------------------- */

/* Elements of t, whether they lie in order, and that all of them are in the storage. */
static int measure(const struct archive *a, const struct torch_tensor *t, size_t *ret_count,
                   bool *ret_in_order)
{
    size_t count = 1, last = (size_t)t->offset, step = 1;
    bool over = false, order = true;
    for (int d = t->ndim - 1; d >= 0; d--) {
        order = order && (t->shape[d] == 1 || (size_t)t->stride[d] == step);
        over = over || __builtin_mul_overflow(step, (size_t)t->shape[d], &step) ||
               __builtin_mul_overflow(count, (size_t)t->shape[d], &count);
    }
    for (int d = 0; d < t->ndim && count > 0; d++) {
        size_t far;
        over = over || __builtin_mul_overflow((size_t)t->shape[d] - 1, (size_t)t->stride[d], &far) ||
               __builtin_add_overflow(last, far, &last);
    }
    if (over || (count > 0 && last >= (size_t)t->storage) || count > (size_t)t->storage)
        return err_set(a->err, ERR_INVALID, "%s: tensor %.*s reaches beyond its storage", a->what,
                       (int)t->name_len, t->name);
    *ret_count = count;
    *ret_in_order = order || count == 0;
    return ERR_OK;
}

static void gather(const struct torch_tensor *t, const uint8_t *from, size_t count, uint8_t *to)
{
    int64_t i[ST_MAX_DIMS] = { 0 };
    for (size_t n = 0; n < count; n++) {
        size_t at = (size_t)t->offset;
        for (int d = 0; d < t->ndim; d++)
            at += (size_t)i[d] * (size_t)t->stride[d];
        memcpy(to + n * t->size, from + at * t->size, t->size);
        for (int d = t->ndim - 1; d >= 0 && ++i[d] == t->shape[d]; d--)
            i[d] = 0;
    }
}

/* The member with the bytes of t. */
static int find_storage(const struct archive *a, const struct torch_tensor *t,
                        const struct member **ret)
{
    char name[KEY_MAX + 8];
    const int n = snprintf(name, sizeof name, "data/%.*s", (int)t->key_len, t->key);
    *ret = n > 0 && (size_t)n < sizeof name ? find(a, name, (size_t)n) : NULL;
    size_t bytes;
    if (*ret == NULL || __builtin_mul_overflow((size_t)t->storage, (size_t)t->size, &bytes) ||
        (*ret)->bytes != bytes)
        return err_set(a->err, ERR_INVALID, "%s: the storage of tensor %.*s is missing or has another "
                       "size", a->what, (int)t->name_len, t->name);
    return ERR_OK;
}

static int by_tensor(const void *pa, const void *pb)
{
    return strcmp(((const struct st_tensor *)pa)->name, ((const struct st_tensor *)pb)->name);
}

/* Memory for names and for what is put in order; *ret_gather is where the latter starts. */
static int make_room(const struct archive *a, const struct torch_tensor *list, size_t n,
                     struct st_file *f, uint8_t **ret_gather)
{
    size_t names = 0, gathered = 0;
    for (size_t i = 0; i < n; i++) {
        size_t count;
        bool order;
        int rc = measure(a, &list[i], &count, &order);
        if (rc != ERR_OK)
            return rc;
        names += list[i].name_len + 1;
        gathered += order ? 0 : count * list[i].size + 63;
        if (gathered > 2 * a->len + (1 << 20))
            return bad(a, "its tensors share their numbers in too many ways");
        if (names > a->len) /* each would be there once, behind an instruction and a length */
            return bad(a, "tensors have the same name");
    }
    f->names = malloc(names + gathered + 64);
    f->tensors = calloc(n + 1, sizeof *f->tensors);
    if (f->names == NULL || f->tensors == NULL)
        return err_nomem(a->err);
    *ret_gather = (uint8_t *)f->names + names;
    return ERR_OK;
}

static int fill(const struct archive *a, const struct torch_tensor *list, size_t n,
                struct st_file *f)
{
    uint8_t *gathered = NULL;
    int rc = make_room(a, list, n, f, &gathered);
    char *name = f->names;
    for (size_t i = 0; rc == ERR_OK && i < n; i++) {
        const struct torch_tensor *t = &list[i];
        struct st_tensor *to = &f->tensors[i];
        const struct member *from = NULL;
        size_t count = 0;
        bool order = true;
        rc = measure(a, t, &count, &order);
        if (rc == ERR_OK)
            rc = find_storage(a, t, &from);
        if (rc != ERR_OK)
            return rc;
        memcpy(name, t->name, t->name_len);
        name[t->name_len] = '\0';
        *to = (struct st_tensor){ .name = name, .dtype = t->dtype, .ndim = t->ndim,
                                  .data = from->data + (size_t)t->offset * t->size * (count > 0),
                                  .bytes = count * t->size };
        memcpy(to->dtype_name, t->dtype_name, sizeof to->dtype_name);
        memcpy(to->shape, t->shape, (size_t)t->ndim * sizeof *t->shape);
        if (!order) {
            gather(t, from->data, count, gathered);
            to->data = gathered;
            gathered += count * t->size;
        }
        name += t->name_len + 1;
    }
    if (rc != ERR_OK)
        return rc;
    f->ntensors = n;
    if (n > 0)
        qsort(f->tensors, n, sizeof *f->tensors, by_tensor);
    for (size_t i = 1; i < n; i++)
        if (strcmp(f->tensors[i - 1].name, f->tensors[i].name) == 0)
            return err_set(a->err, ERR_INVALID, "%s has the tensor %s twice", a->what,
                           f->tensors[i].name);
    return ERR_OK;
}

static int torch_open_mem(const void *data, size_t len, const char *what, struct st_file **ret,
                          struct err *err)
{
    struct archive a = { .map = data, .len = len, .what = what, .err = err };
    struct st_file *f = calloc(1, sizeof *f);
    struct torch_tensor *list = NULL;
    size_t n = 0;
    int rc = f == NULL ? err_nomem(err) : read_directory(&a);
    if (rc == ERR_OK) {
        const struct member *pickle = find(&a, "data.pkl", 8);
        rc = torch_pickle_read(pickle->data, pickle->bytes, what, &list, &n, err);
    }
    if (rc == ERR_OK)
        rc = fill(&a, list, n, f);
    free(list);
    free(a.members);
    if (rc != ERR_OK) {
        st_close(f);
        return rc;
    }
    f->map = data;
    f->map_len = len;
    *ret = f;
    return ERR_OK;
}

/* --- either format ----------------------------------------------------------------------------- */

int weights_open_mem(const void *data, size_t len, const char *what, struct st_file **ret,
                     struct err *err)
{
    if (len >= 4 && memcmp(data, "PK\3\4", 4) == 0)
        return torch_open_mem(data, len, what, ret, err);
    if (len >= 2 && memcmp(data, "\x80\2", 2) == 0)
        return err_set(err, ERR_INVALID, "%s is a bare pickle, as torch.save() wrote before PyTorch "
                       "1.6: load it there and save it again, best as safetensors", what);
    if (len >= 4 && memcmp(data, "GGUF", 4) == 0)
        return err_set(err, ERR_INVALID, "%s is a GGUF file, which says itself what a config would: "
                       "give it without one", what);
    return st_open_mem(data, len, what, ret, err);
}

int weights_open(const char *path, struct st_file **ret, struct err *err)
{
    uint8_t head[4] = { 0 };
    struct stat sb;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return st_open(path, ret, err); /* which says why */
    const bool ours = read(fd, head, sizeof head) == (ssize_t)sizeof head &&
                     (memcmp(head, "PK\3\4", 4) == 0 || memcmp(head, "\x80\2", 2) == 0 ||
                      memcmp(head, "GGUF", 4) == 0);
    if (!ours || fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode)) {
        close(fd);
        return st_open(path, ret, err);
    }
    const size_t len = (size_t)sb.st_size;
    void *map = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
    const int why = errno;
    close(fd);
    if (map == MAP_FAILED)
        return err_set(err, ERR_IO, "%s: %s", path, strerror(why));
    int rc = weights_open_mem(map, len, path, ret, err);
    if (rc == ERR_OK)
        (*ret)->mapped = true;
    else
        munmap(map, len);
    return rc;
}
