/* fuzz_adapter.c - a PEFT adapter for a small llama: adapter_config.json, a NUL, the safetensors
 * file.  What is accepted is hashed, written back and built. */
#include "engine/adapter.h"
#include "tests/fuzz.h"
#include "tests/support_adapter.h"

static void check_adapter(const struct arch *arch, const struct adapter_src *src)
{
    struct adapter *a = NULL;
    struct err err = { 0 };
    uint8_t hash[32];
    adapter_src_hash(src, hash);
    law(memcmp(hash, src->hash, sizeof hash) == 0, "the hash is the content's");
    law(src->rank_max <= ADAPTER_MAX_RANK, "ranks have a limit");
    if (adapter_build(arch, src, 1, NULL, &a, &err) == ERR_OK)
        law(a->bytes == adapter_build_bytes(arch, src), "the budget knows the size");
    else
        law(err.msg[0] != '\0', "a failure says why");
    adapter_free(a);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct arch arch;
    if (arch.L == 0)
        support_small_arch(&arch);
    const size_t cut = fuzz_cut(data, len), rest = cut < len ? len - cut - 1 : 0;
    char *config = fuzz_text(data, cut), *weights = fuzz_text(data + len - rest, rest);
    struct st_file *f = NULL;
    struct adapter_src *src = NULL;
    struct err err = { 0 };
    if (st_open_mem(weights, rest, "weights", &f, &err) == ERR_OK &&
        peft_parse(&arch, config, cut, f, &src, &err) == ERR_OK)
        check_adapter(&arch, src);
    else
        law(err.msg[0] != '\0', "a failure says why");
    adapter_src_free(src);
    st_close(f);
    free(config);
    free(weights);
    return 0;
}
