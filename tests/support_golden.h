/* support_golden.h - the traces of training that PEFT made (golden/train of the reference folder):
 * their tensors, widened to fp32, and their numbers.  A test of them calls these; where the folder
 * is missing they say so and skip the test. */
#ifndef TESTS_SUPPORT_GOLDEN_H
#define TESTS_SUPPORT_GOLDEN_H

#include <jansson.h>
#include <stddef.h>

struct golden_tensor {
    char name[192];
    int rows, cols; /* a vector: [n][1] */
    size_t n;
    float *data;
};
struct golden {
    size_t n;
    struct golden_tensor *tensors; /* ascending by name */
};

/* golden/train/TRACE/FILE.safetensors */
struct golden golden_load(const char *trace, const char *file);
void golden_free(struct golden *g);
/* By name; fails the test if there is none. */
const struct golden_tensor *golden_find(const struct golden *g, const char *name);
/* golden/train/TRACE/trace.json; json_decref() it. */
json_t *golden_trace(const char *trace);
double golden_number(const json_t *object, const char *key);

#endif
