/* tar.c - an adapter folder as a tar file, through libarchive with the tar format alone switched
 * on: no compression, no other archives.
 *
 * Nothing is ever written under a name from the archive.  An entry is the config, the weights, or
 * on the list of files that have no say in the result; anything else is refused by name, because
 * it might have been meant to count (a tokenizer, say, or a second set of weights). */
#include "api/api_int.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char config_name[] = "adapter_config.json";
static const char weights_name[] = "adapter_model.safetensors", pickle_name[] = "adapter_model.bin";
/* Documents, and records of the training run. */
static const char *const ignored[] = {
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "SOURCE", ".gitattributes",
    "training_args.bin", "trainer_state.json",
};
enum { MAX_CONFIG = 1 << 20, MAX_IGNORED = 4 << 20, MAX_ENTRIES = 64 };

static int tar_error(struct archive *a, struct err *err)
{
    if (archive_errno(a) == ENOMEM)
        return err_nomem(err);
    return err_set(err, ERR_INVALID, "the body is not a whole, uncompressed tar file: make it with "
                   "tar -C FOLDER -cf adapter.tar %s %s", config_name, weights_name);
}

static int read_config(struct archive *a, size_t size, struct tar_adapter *t, struct err *err)
{
    if (size == 0 || size > MAX_CONFIG)
        return err_set(err, ERR_INVALID, "%s has %zu bytes; 1 to %d are accepted", config_name,
                       size, MAX_CONFIG);
    t->config = malloc(size + 1);
    if (t->config == NULL)
        return err_nomem(err);
    const la_ssize_t n = archive_read_data(a, t->config, size);
    if (n < 0 || (size_t)n != size)
        return tar_error(a, err);
    t->config[size] = '\0';
    t->config_len = size;
    return ERR_OK;
}

static int read_weights(struct archive *a, const char *db_path, size_t max, struct tar_adapter *t,
                        struct err *err)
{
    enum { PIECE = 1 << 16 };
    char *piece = malloc(PIECE);
    if (piece == NULL)
        return err_nomem(err);
    int rc = spool_open(db_path, max, &t->weights, err);
    while (rc == ERR_OK) {
        const la_ssize_t n = archive_read_data(a, piece, PIECE);
        if (n == 0)
            break;
        rc = n < 0 ? tar_error(a, err) : spool_write(t->weights, piece, (size_t)n, err);
    }
    free(piece);
    return rc;
}

static int read_entry(struct archive *a, struct archive_entry *e, const char *db_path, size_t max,
                      struct tar_adapter *t, struct err *err)
{
    const char *path = archive_entry_pathname(e);
    const char *name = path ? path : "";
    while (strncmp(name, "./", 2) == 0)
        name += 2;
    if (archive_entry_filetype(e) == AE_IFDIR && (name[0] == '\0' || strcmp(name, ".") == 0))
        return ERR_OK; /* tar -C FOLDER . */
    if (archive_entry_filetype(e) != AE_IFREG || archive_entry_hardlink(e) != NULL ||
        archive_entry_symlink(e) != NULL)
        return err_set(err, ERR_INVALID, "the tar file's entry \"%.100s\" is not a plain file",
                       name);
    const int64_t size = archive_entry_size(e);
    if (strchr(name, '/') != NULL)
        return err_set(err, ERR_INVALID, "the tar file's entry \"%.100s\" lies in a folder: make it "
                       "with tar -C FOLDER -cf adapter.tar %s %s", name, config_name,
                       weights_name);
    const bool config = strcmp(name, config_name) == 0, weights = strcmp(name, weights_name) == 0 ||
                                                                     strcmp(name, pickle_name) == 0;
    if ((config && t->config != NULL) || (weights && t->weights != NULL))
        return err_set(err, ERR_INVALID, "the tar file has %s twice",
                       config ? config_name : "weights (safetensors or bin: send one of them)");
    if (config)
        return read_config(a, (size_t)size, t, err);
    if (weights)
        return read_weights(a, db_path, max, t, err);
    for (size_t i = 0; i < sizeof ignored / sizeof ignored[0]; i++)
        if (strcmp(name, ignored[i]) == 0 && size <= MAX_IGNORED)
            return ERR_OK;
    return err_set(err, ERR_INVALID, "the tar file's entry \"%.100s\" is none that an adapter needs: "
                   "send %s and %s", name, config_name, weights_name);
}

static int read_all(struct archive *a, const char *path, const char *db_path, size_t max,
                    struct tar_adapter *t, struct err *err)
{
    if (archive_read_open_filename(a, path, 1 << 16) != ARCHIVE_OK)
        return tar_error(a, err);
    int entries = 0, rc = ERR_OK;
    while (rc == ERR_OK) {
        struct archive_entry *e;
        const int r = archive_read_next_header(a, &e);
        if (r == ARCHIVE_EOF)
            break;
        if (r != ARCHIVE_OK && r != ARCHIVE_WARN)
            return tar_error(a, err);
        if (++entries > MAX_ENTRIES)
            return err_set(err, ERR_INVALID, "the tar file has more than %d entries", MAX_ENTRIES);
        rc = read_entry(a, e, db_path, max, t, err);
    }
    if (rc == ERR_OK && t->config == NULL)
        rc = err_set(err, ERR_INVALID, "the tar file has no %s", config_name);
    if (rc == ERR_OK && t->weights == NULL)
        rc = err_set(err, ERR_INVALID, "the tar file has no %s", weights_name);
    return rc;
}

int tar_read_adapter(const char *path, const char *db_path, size_t max, struct tar_adapter *ret,
                     struct err *err)
{
    struct tar_adapter t = { 0 };
    struct archive *a = archive_read_new();
    if (a == NULL)
        return err_nomem(err);
    archive_read_support_format_tar(a);
    int rc = read_all(a, path, db_path, max, &t, err);
    archive_read_free(a);
    if (rc != ERR_OK) {
        tar_adapter_free(&t);
        return rc;
    }
    *ret = t;
    return ERR_OK;
}

void tar_adapter_free(struct tar_adapter *t)
{
    free(t->config);
    spool_close(t->weights);
    *t = (struct tar_adapter){ 0 };
}

/* --- writing ------------------------------------------------------------------------------------- */

/* libarchive pushes its blocks here. */
struct sink {
    struct spool *spool;
    struct err *err;
};

static la_ssize_t sink_write(struct archive *a, void *ud, const void *data, size_t len)
{
    struct sink *s = ud;
    if (spool_write(s->spool, data, len, s->err) == ERR_OK)
        return (la_ssize_t)len;
    archive_set_error(a, EIO, "spool");
    return -1;
}

static int write_failed(struct archive *a, struct err *err)
{
    return err_set(err, ERR_IO, "writing a tar file: %s", archive_error_string(a));
}

static int write_header(struct archive *a, const char *name, int64_t size, struct err *err)
{
    struct archive_entry *e = archive_entry_new();
    if (e == NULL)
        return err_nomem(err);
    archive_entry_set_pathname(e, name);
    archive_entry_set_size(e, size);
    archive_entry_set_filetype(e, AE_IFREG);
    archive_entry_set_perm(e, 0644);
    const int r = archive_write_header(a, e);
    archive_entry_free(e);
    return r == ARCHIVE_OK ? ERR_OK : write_failed(a, err);
}

static int write_file(struct archive *a, const char *name, int fd, struct err *err)
{
    struct stat sb;
    if (fstat(fd, &sb) != 0)
        return err_set(err, ERR_IO, "%s: %s", name, strerror(errno));
    int rc = write_header(a, name, sb.st_size, err);
    char piece[1 << 14];
    while (rc == ERR_OK) {
        const ssize_t n = read(fd, piece, sizeof piece);
        if (n == 0)
            break;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            rc = err_set(err, ERR_IO, "%s: %s", name, strerror(errno));
        else if (archive_write_data(a, piece, (size_t)n) != n)
            rc = write_failed(a, err);
    }
    return rc;
}

static int write_all(struct archive *a, struct sink *sink, const char *config, size_t config_len,
                     int weights, struct err *err)
{
    archive_write_set_format_pax_restricted(a);
    if (archive_write_open2(a, sink, NULL, sink_write, NULL, NULL) != ARCHIVE_OK)
        return write_failed(a, err);
    int rc = write_header(a, config_name, (int64_t)config_len, err);
    if (rc == ERR_OK && archive_write_data(a, config, config_len) != (la_ssize_t)config_len)
        rc = write_failed(a, err);
    if (rc == ERR_OK)
        rc = write_file(a, weights_name, weights, err);
    if (rc == ERR_OK && archive_write_close(a) != ARCHIVE_OK)
        rc = write_failed(a, err);
    return rc;
}

int tar_write_adapter(const char *config, size_t config_len, const char *weights_path,
                      const char *db_path, struct spool **ret, struct err *err)
{
    struct sink sink = { .err = err };
    const int fd = open(weights_path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, ERR_IO, "%s: %s", weights_path, strerror(errno));
    struct archive *a = archive_write_new();
    int rc = a ? spool_open(db_path, SIZE_MAX, &sink.spool, err) : err_nomem(err);
    if (rc == ERR_OK)
        rc = write_all(a, &sink, config, config_len, fd, err);
    archive_write_free(a);
    close(fd);
    if (rc != ERR_OK) {
        spool_close(sink.spool);
        return rc;
    }
    *ret = sink.spool;
    return ERR_OK;
}
