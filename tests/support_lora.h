/* support_lora.h - random adapters for tests, made in memory.
 *
 * All linear layers are adapted.  Tensors are drawn from a generator seeded with `seed`; their
 * type is F32, F16 or BF16 by seed; AdaLoRA gets an E vector, and a rank per module between 0 and
 * `rank`.  `size` is roughly the size of the change relative to the activations.  Failures abort. */
#ifndef TESTS_SUPPORT_LORA_H
#define TESTS_SUPPORT_LORA_H

#include "engine/adapter.h"

struct adapter_src *support_lora_src(const struct arch *arch, enum adapter_method method,
                                     int rank, float size, uint64_t seed);
struct adapter *support_lora(const struct arch *arch, enum adapter_method method, int rank,
                             float size, uint64_t seed);
/* One that has gone: `bytes` of memory full of what it held, for adapter_build() to take. */
struct adapter *support_spare(size_t bytes);

#endif
