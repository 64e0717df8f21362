/* fuzz_tar.c - an uploaded tar file. */
#include "api/api_int.h"
#include "tests/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    enum { MAX = 1 << 16 };
    struct fuzz_file f = fuzz_file(data, len);
    struct tar_adapter t;
    struct err err = { 0 };
    if (tar_read_adapter(f.path, ":memory:", MAX, &t, &err) == ERR_OK) {
        law(strlen(t.config) <= t.config_len && t.config_len <= len, "the config is the file's");
        law(spool_size(t.weights) <= MAX, "weights keep to the limit");
        tar_adapter_free(&t);
    } else {
        law(err.msg[0] != '\0', "a failure says why");
    }
    close(f.fd);
    return 0;
}
