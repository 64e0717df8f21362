/* support_store.h - made-up adapters for tests of the store, without files and without a base. */
#ifndef TESTS_SUPPORT_STORE_H
#define TESTS_SUPPORT_STORE_H

#include "engine/adapter.h"

/* q and v of `layers` layers, `width` inputs and outputs, F32, LoRA of the given rank.  The same
 * numbers give the same content; failures abort. */
struct adapter_src *support_adapter(uint64_t seed, int layers, int rank, int width);
/* AdaLoRA with init_r 4: layer l's q keeps l % 5 triplets (so layer 0 keeps none), v keeps all. */
struct adapter_src *support_adalora(uint64_t seed, int layers, int width);
/* Every field and every byte of the tensors (pass tensors = false for store_version_modules()). */
void support_same_adapter(const struct adapter_src *a, const struct adapter_src *b, bool tensors);

/* 64 hex digits: names of two bases. */
extern const char support_base_1[], support_base_2[];

#endif
