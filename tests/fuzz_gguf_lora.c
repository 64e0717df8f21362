/* fuzz_gguf_lora.c - a LoRA in GGUF for a small llama.  What is accepted is hashed and built, and its
 * config names what is in it. */
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
    law(src->nmodules > 0 && src->rank_min > 0 && src->rank_max <= ADAPTER_MAX_RANK, "ranks have limits");
    law(strstr(src->config, src->modules[0].path) != NULL, "the config names the modules");
    law(adapter_build(arch, src, 1, NULL, &a, &err) == ERR_OK, "what is accepted can be built");
    law(a->bytes == adapter_build_bytes(arch, src), "the budget knows the size");
    adapter_free(a);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct arch arch;
    if (arch.L == 0)
        support_small_arch(&arch);
    char *copy = fuzz_text(data, len);
    struct adapter_src *src = NULL;
    struct err err = { 0 };
    if (peft_gguf_parse(&arch, copy, len, "input", &src, &err) == ERR_OK)
        check_adapter(&arch, src);
    else
        law(err.msg[0] != '\0', "a failure says why");
    adapter_src_free(src);
    free(copy);
    return 0;
}
