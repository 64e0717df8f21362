/* arch_int.h - shared by the files of arch.h: typed reading of config.json.
 *
 * A field that is missing or null takes the default; one of another type or outside its range is
 * an error that names field and value.  The same functions read the form kept in a base file, so
 * their messages say "model config". */
#ifndef ENGINE_ARCH_INT_H
#define ENGINE_ARCH_INT_H

#include "engine/arch.h"

#include <jansson.h>

extern const struct family arch_families[];
extern const size_t arch_nfamilies;

enum { ARCH_MAX_LAYERS = 512 };

/* Pass as the default of a field that must be there. */
#define CFG_REQUIRED (-2147483647 - 1)

static inline bool cfg_absent(const json_t *v) { return v == NULL || json_is_null(v); }
/* The first name of "a|b" that the object has a value for, or the last; in `ret`. */
const char *cfg_pick(const json_t *o, const char *names, char ret[64]);
int cfg_int(const json_t *o, const char *key, int def, int min, int max, int *ret,
            struct err *err);
int cfg_bool(const json_t *o, const char *key, bool def, bool *ret, struct err *err);
/* `def` NAN: required. */
int cfg_double(const json_t *o, const char *key, double def, double min, double max, double *ret,
               struct err *err);

/* All numbers of an arch are within what the engine can index, and fit each other. */
int arch_check(const struct arch *a, struct err *err);
void arch_set_windowed(struct arch *a, int layer);
void arch_set_no_rope(struct arch *a, int layer);

/* All of rope (arch_rope.c): theta, how much of a head rotates, scaling.  After shapes and family. */
int cfg_rope(const json_t *json, const struct family *f, struct arch *a, struct err *err);
/* Kind and numbers of rope scaling, from an object with rope_type or type, inside of config.json. */
int cfg_rope_scaling(const json_t *json, const json_t *o, struct arch *a, struct err *err);
/* A list of `n` divisors of frequencies. */
int cfg_rope_divisors(const json_t *o, const char *key, int n, float *ret, struct err *err);
/* "gelu_new" and the like. */
bool activation_parse(const char *name, enum activation *ret);
/* A family with silu has nothing else; the others have some gelu. */
bool activation_fits(const struct family *f, enum activation act);
/* Both say that field `key` is missing, or what it is and what is expected; ERR_INVALID. */
int cfg_missing(const char *key, struct err *err);
int cfg_mistyped(const char *key, const json_t *v, const char *expected, struct err *err);
/* NULL text gives a NULL object; `what` is for the message. */
int cfg_parse(const char *text, const char *what, json_t **ret, struct err *err);

/* The families' own readers (arch_readers.c). */
int arch_read_llama(const void *json, struct arch *a, struct err *err);
int arch_read_mistral(const void *json, struct arch *a, struct err *err);
int arch_read_qwen2(const void *json, struct arch *a, struct err *err);
int arch_read_qwen3(const void *json, struct arch *a, struct err *err);
int arch_read_gpt2(const void *json, struct arch *a, struct err *err);
int arch_read_neox(const void *json, struct arch *a, struct err *err);
int arch_read_bloom(const void *json, struct arch *a, struct err *err);
int arch_read_chatglm(const void *json, struct arch *a, struct err *err);
int arch_read_glm(const void *json, struct arch *a, struct err *err);
int arch_read_phi3(const void *json, struct arch *a, struct err *err);
int arch_read_smollm3(const void *json, struct arch *a, struct err *err);
int arch_read_gemma2(const void *json, struct arch *a, struct err *err);
int arch_read_gemma3(const void *json, struct arch *a, struct err *err);

#endif
