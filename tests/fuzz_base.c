/* fuzz_base.c - base files, loaded in every way: fast and fp32, copied and mapped. */
#include "engine/base.h"
#include "tests/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct fuzz_file f = fuzz_file(data, len);
    struct err err = { 0 };
    size_t bytes = 0;
    if (base_size(f.path, &bytes, &err) == ERR_OK)
        law(bytes <= 64 * len + (1 << 20), "a small file asks for little memory");
    for (int way = 0; way < 4; way++) {
        struct base *b = NULL;
        err = (struct err){ 0 };
        if (base_load(f.path, way & 1 ? PREC_F32 : PREC_FAST, way & 2, &b, &err) != ERR_OK)
            law(err.msg[0] != '\0', "a failure says why");
        base_free(b);
    }
    close(f.fd);
    return 0;
}
