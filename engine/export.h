/* export.h - adapters in forms for other programs: plain LoRA, GGUF, merged into the weights.
 *
 * Only what delta_check() lets pass can be put into these forms, and a family of models only if it
 * is in the table behind export_family_find(); everything else is refused by name.  Results are
 * exact up to the one rounding that each function names. */
#ifndef ENGINE_EXPORT_H
#define ENGINE_EXPORT_H

#include "engine/adapter.h"

/* Families whose weights lie in files as this module needs them: one [out, in] matrix per linear
 * layer of a block, named by its path. */
struct export_family {
    const char *model_type; /* config.json */
    const char *gguf_arch;  /* general.architecture of llama.cpp */
    bool permuted;          /* GGUF has rows of q and k reordered: pairs (i, i + hd/2) side by side */
};
/* ERR_INVALID names a family that is not in the table. */
int export_family_find(const struct arch *arch, const struct export_family **ret, struct err *err);

/* The same change as plain LoRA, without any decomposition: E goes into B, modules of rank 0 are
 * left out, ranks and alphas that differ go into rank_pattern and alpha_pattern, and every alpha is
 * such that alpha / rank is the module's scaling to the last bit.  Where E is folded the factors
 * become F32: exact for F16 and BF16 sources, one rounding of B for F32.  Tensors that need no
 * folding keep type and bytes.  *ret has a config of its own and no borrowed memory. */
int export_lora(const struct adapter_src *a, struct adapter_src **ret, struct err *err);

/* A GGUF file for llama.cpp's --lora: F32 factors, one alpha; scalings and E that alpha / rank does
 * not give are folded into B (one rounding). */
int export_gguf(const struct arch *arch, const struct adapter_src *a, const char *path,
                struct err *err);

/* What GGUF calls a module of the blocks: "attn_q", or NULL. */
const char *export_gguf_name(int module);
/* The config of a plain LoRA made from its modules: fills a->config and a->alpha. */
int export_lora_config(struct adapter_src *a, struct err *err);

/* B[o][j] * factor * E_j in fp64, rounded once. */
float export_b(const struct adapter_src_module *m, size_t o, size_t j, double factor);

#endif
