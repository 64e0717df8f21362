/* fuzz_tokens.c - `--tokens` of lorad logits and lorad perplexity: a list of ids, or, after a first
 * byte F, a safetensors file whose tensor "ids" is read.
 *
 * The reader is private to its command, so the source is included: the linker then leaves the
 * library's copy out. */
#include "server/cmd_inspect.c"
#include "tests/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct sequences s = { 0 };
    struct err err = { 0 };
    int rc;
    if (len > 0 && data[0] == 'F') {
        char spec[64];
        struct fuzz_file f = fuzz_file(data + 1, len - 1);
        snprintf(spec, sizeof spec, "%s:ids", f.path);
        rc = read_tokens(spec, &s, &err);
        close(f.fd);
    } else {
        char *spec = fuzz_text(data, len);
        rc = read_tokens(spec, &s, &err);
        free(spec);
    }
    if (rc == ERR_OK) {
        law(s.n >= 1 && s.start[0] == 0, "there is a sequence");
        for (size_t i = 0; i < s.n; i++)
            law(s.start[i] < s.start[i + 1] && s.start[i + 1] - s.start[i] <= longest(&s),
                "no sequence is empty");
        check_ids(&s, 1000, &err);
    } else {
        law(err.msg[0] != '\0', "a failure says why");
    }
    sequences_free(&s);
    return 0;
}
