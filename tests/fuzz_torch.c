/* fuzz_torch.c - adapter_model.bin.
 *
 * The first byte says what follows: P, a pickle, which is put into an archive with two storages; or
 * anything else, the archive itself.  The first reaches what the second seldom does: an archive's
 * offsets hardly survive a mutation.  What is accepted is read to its last byte, and as an adapter. */
#include "engine/adapter.h"
#include "engine/torch_file.h"
#include "engine/util.h"
#include "tests/fuzz.h"
#include "tests/support_adapter.h"

/* --- an archive around a pickle ------------------------------------------------------------- */

static void put(struct buf *b, const void *p, size_t n) { law(buf_add(b, p, n) == ERR_OK, "memory"); }

static void number(struct buf *b, size_t v, size_t n)
{
    uint8_t le[32] = { 0 };
    for (size_t i = 0; i < n && i < sizeof v; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    put(b, le, n);
}

static void member(struct buf *zip, struct buf *directory, const char *name, const void *p, size_t n)
{
    const size_t at = zip->len, k = strlen(name);
    put(zip, "PK\3\4", 4);
    number(zip, 0, 22);
    number(zip, k, 4);
    put(zip, name, k);
    put(zip, p, n);
    put(directory, "PK\1\2", 4);
    number(directory, 0, 16);
    number(directory, n, 4);
    number(directory, n, 4);
    number(directory, k, 14);
    number(directory, at, 4);
    put(directory, name, k);
}

static void wrap(const uint8_t *pickle, size_t len, struct buf *zip)
{
    static const float values[2][64] = { { 1, 2, 3, 4 }, { 0.5f } };
    struct buf directory;
    buf_init(zip, 1 << 20);
    buf_init(&directory, 1 << 20);
    member(zip, &directory, "a/data.pkl", pickle, len);
    member(zip, &directory, "a/data/0", values[0], sizeof values[0]);
    member(zip, &directory, "a/data/1", values[1], 32);
    const size_t at = zip->len;
    put(zip, directory.data, directory.len);
    put(zip, "PK\5\6\0\0\0\0\3\0\3\0", 12);
    number(zip, directory.len, 4);
    number(zip, at, 6);
    buf_free(&directory);
}

/* --- what was read --------------------------------------------------------------------------- */

static void read_all(const struct st_file *f)
{
    struct err err = { 0 };
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < f->ntensors; i++) {
        const struct st_tensor *t = &f->tensors[i];
        float v[16];
        law(i == 0 || strcmp(f->tensors[i - 1].name, t->name) < 0, "names ascend");
        law(st_find(f, t->name) == t, "a tensor is found by its name");
        for (size_t b = 0; b < t->bytes; b++)
            sum = (uint8_t)(sum + t->data[b]);
        for (size_t n = st_count(t), at = 0; at < n && err.msg[0] == '\0'; at += 16)
            st_f32(t, at, n - at < 16 ? n - at : 16, v, &err);
    }
}

static void parse(const struct st_file *f)
{
    static const char config[] = "{\"peft_type\":\"LORA\",\"task_type\":\"CAUSAL_LM\",\"r\":2,"
                                 "\"lora_alpha\":2,\"target_modules\":[\"q_proj\"]}";
    static struct arch arch;
    struct adapter_src *src = NULL;
    struct err err = { 0 };
    if (arch.L == 0)
        support_small_arch(&arch);
    if (peft_parse(&arch, config, strlen(config), f, &src, &err) != ERR_OK)
        law(err.msg[0] != '\0', "a failure says why");
    adapter_src_free(src);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    struct buf zip = { 0 };
    if (len > 0 && data[0] == 'P' && (len < 2 || data[1] != 'K')) {
        wrap(data + 1, len - 1, &zip);
        data = (const uint8_t *)zip.data;
        len = zip.len;
    }
    char *copy = fuzz_text(data, len);
    buf_free(&zip);
    if (weights_open_mem(copy, len, "input", &f, &err) == ERR_OK) {
        read_all(f);
        parse(f);
    } else {
        law(err.msg[0] != '\0', "a failure says why");
    }
    st_close(f);
    free(copy);
    return 0;
}
