/* arch.c - what follows from a model's shapes: sizes and names of its linear layers. */
#include "engine/arch.h"
#include "engine/arch_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct family *family_find(const char *model_type)
{
    for (size_t i = 0; i < arch_nfamilies; i++)
        if (strcmp(arch_families[i].model_type, model_type) == 0)
            return &arch_families[i];
    return NULL;
}

int arch_in(const struct arch *a, enum module m)
{
    return m == MOD_O ? a->H * a->hd : m == MOD_DOWN ? a->F : a->D;
}

int arch_out(const struct arch *a, enum module m)
{
    switch (m) {
    case MOD_Q:
        return a->H * a->hd;
    case MOD_K:
    case MOD_V:
        return a->G * a->hd;
    case MOD_QKV:
        return (a->H + 2 * a->G) * a->hd;
    case MOD_GATE:
    case MOD_UP:
        return a->F;
    case MOD_GATE_UP:
        return 2 * a->F;
    default:
        return a->D;
    }
}

bool arch_has_bias(const struct arch *a, enum module m)
{
    return m <= MOD_V || m == MOD_QKV ? a->qkv_bias : m == MOD_O ? a->o_bias : a->mlp_bias;
}

bool arch_has_module(const struct arch *a, enum module m)
{
    return family_find(a->family)->module_path[m] != NULL;
}

static bool has_bit(const uint8_t *set, int i) { return set[i / 8] >> (i % 8) & 1; }
static void set_bit(uint8_t *set, int i) { set[i / 8] |= (uint8_t)(1 << (i % 8)); }

bool arch_layer_windowed(const struct arch *a, int layer) { return has_bit(a->windowed, layer); }
void arch_set_windowed(struct arch *a, int layer) { set_bit(a->windowed, layer); }

bool arch_layer_rope(const struct arch *a, int layer)
{
    return a->rot > 0 && !has_bit(a->no_rope, layer);
}

void arch_set_no_rope(struct arch *a, int layer) { set_bit(a->no_rope, layer); }

void arch_module_path(const struct arch *a, int layer, enum module m, char *ret, size_t cap)
{
    const char *format = family_find(a->family)->module_path[m];
    if (format != NULL)
        snprintf(ret, cap, format, layer);
    else
        ret[0] = '\0';
}

/* Does `path` read as `format` with a layer number in place of %d?  -1 if not. */
static int match_layer(const char *format, const char *path, int L)
{
    size_t prefix = (size_t)(strstr(format, "%d") - format);
    if (strncmp(path, format, prefix) != 0)
        return -1;
    const char *digits = path + prefix;
    size_t n = strspn(digits, "0123456789");
    if (n == 0 || n > 3 || (n > 1 && digits[0] == '0') ||
        strcmp(digits + n, format + prefix + 2) != 0)
        return -1;
    int layer = atoi(digits);
    return layer < L ? layer : -1;
}

bool arch_module_parse(const struct arch *a, const char *path, int *ret_layer,
                       enum module *ret_module)
{
    const struct family *f = family_find(a->family);
    for (int m = 0; m < MOD_COUNT; m++) {
        int layer = f->module_path[m] ? match_layer(f->module_path[m], path, a->L) : -1;
        if (layer < 0)
            continue;
        *ret_layer = layer;
        *ret_module = (enum module)m;
        return true;
    }
    return false;
}
