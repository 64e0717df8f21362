/* fuzz_gguf.c - GGUF files: the container, its vocabulary, and the import of what is a model. */
#include "engine/base.h"
#include "engine/import_int.h"
#include "engine/tokenizer.h"
#include "tests/fuzz.h"

static void read_vocabulary(const struct gguf *g)
{
    char *json = NULL;
    struct tokenizer *t = NULL;
    struct err err = { 0 };
    if (gguf_tokenizer(g, &json, &err) == ERR_OK)
        tokenizer_load(json, strlen(json), &t, &err);
    tokenizer_free(t);
    free(json);
}

static bool read_container(const char *data, size_t len)
{
    struct gguf *g = NULL;
    struct err err = { 0 };
    if (gguf_open_mem(data, len, "input", &g, &err) != ERR_OK) {
        law(err.msg[0] != '\0', "a failure says why");
        return false;
    }
    for (size_t i = 0; i < g->ntensors; i++) {
        const struct gguf_tensor *t = &g->tensors[i];
        law((const char *)t->data >= data && (const char *)t->data + t->bytes <= data + len,
            "a tensor lies in the file");
    }
    read_vocabulary(g);
    gguf_close(g);
    return true;
}

static void import(const void *data, size_t len)
{
    char out[128];
    const char *tmp = getenv("TMPDIR");
    snprintf(out, sizeof out, "%.80s/fuzz-%ld.base", tmp != NULL ? tmp : "/tmp", (long)getpid());
    struct fuzz_file f = fuzz_file(data, len);
    const struct base_import_opts o = { .name = "fuzz" };
    struct base *b = NULL;
    struct err err = { 0 };
    if (base_import(f.path, out, &o, &err) == ERR_OK) {
        law(base_load(out, PREC_FAST, false, &b, &err) == ERR_OK, "what was imported loads");
        base_free(b);
        unlink(out);
    } else {
        law(err.msg[0] != '\0', "a failure says why");
        law(access(out, F_OK) != 0, "a failed import leaves nothing");
    }
    close(f.fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *copy = fuzz_text(data, len);
    const bool good = read_container(copy, len);
    free(copy);
    if (good)
        import(data, len);
    return 0;
}
