/* fuzz_safetensors.c - the safetensors reader: any bytes, then every tensor of what it accepts. */
#include "engine/safetensors.h"
#include "tests/fuzz.h"

static void read_tensor(const struct st_file *f, const struct st_tensor *t, const uint8_t *file)
{
    law(st_find(f, t->name) == t, "a tensor is found under its name");
    law(t->data >= file + f->data_begin && t->data + t->bytes <= file + f->map_len,
        "a tensor lies in the file");
    float v[64];
    const size_t n = st_count(t);
    for (size_t i = 0; i < n; i += 64) {
        struct err err = { 0 };
        if (st_f32(t, i, n - i < 64 ? n - i : 64, v, &err) != ERR_OK) {
            law(err.code != ERR_OK && err.msg[0] != '\0', "a failure says why");
            return;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    uint8_t *copy = (uint8_t *)fuzz_text(data, len);
    if (st_open_mem(copy, len, "input", &f, &err) == ERR_OK) {
        size_t bytes = 0;
        for (size_t i = 0; i < f->ntensors; i++) {
            read_tensor(f, &f->tensors[i], copy);
            bytes += f->tensors[i].bytes;
        }
        law(f->data_begin + bytes == len, "tensors tile the data");
        for (size_t i = 0; i < f->nmeta; i++)
            law(st_meta(f, f->meta[i].key) != NULL, "metadata is found under its key");
    } else {
        law(err.msg[0] != '\0', "a failure says why");
    }
    st_close(f);
    free(copy);
    return 0;
}
