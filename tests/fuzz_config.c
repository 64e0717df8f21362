/* fuzz_config.c - config.json, a NUL, generation_config.json; the arch of a base file comes from
 * there, so its JSON must read back as itself. */
#include "engine/arch.h"
#include "tests/fuzz.h"

static void check_arch(const struct arch *a)
{
    char path[256];
    int layer;
    enum module m;
    struct arch again;
    struct err err = { 0 };
    arch_module_path(a, a->L - 1, MOD_DOWN, path, sizeof path);
    law(arch_module_parse(a, path, &layer, &m) && layer == a->L - 1 && m == MOD_DOWN,
        "a module's path names it");
    char *json = arch_to_json(a);
    law(json != NULL, "memory");
    law(arch_from_json(json, &again, &err) == ERR_OK, err.msg);
    char *second = arch_to_json(&again);
    law(second != NULL && strcmp(json, second) == 0, "an arch reads back as itself");
    free(json);
    free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    const size_t cut = fuzz_cut(data, len);
    char *config = fuzz_text(data, cut);
    char *generation = cut < len ? fuzz_text(data + cut + 1, len - cut - 1) : NULL;
    struct arch a;
    struct err err = { 0 };
    if (arch_from_config(config, generation, &a, &err) == ERR_OK)
        check_arch(&a);
    else
        law(err.msg[0] != '\0', "a failure says why");
    if (arch_from_json(config, &a, &err) == ERR_OK)
        check_arch(&a);
    free(config);
    free(generation);
    return 0;
}
