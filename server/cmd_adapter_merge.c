/* cmd_adapter_merge.c - `lorad adapter merge`: an adapter added into a Hugging Face folder. */
#include "server/cmd_adapter.h"

#include "engine/merge.h"
#include "engine/safetensors.h"
#include "server/stop.h"

#include <stdio.h>
#include <string.h>

static bool show(void *ud, const char *tensor, size_t done, size_t total)
{
    (void)ud;
    (void)tensor;
    progress("merging", done, total);
    return stop_asked();
}

/* A version is bound to a base file; with --base the folder is held to being that file's source. */
static int check_base(const struct opts *o, const struct adapter_arg *a, const char *dir,
                      char ret_source[65], struct err *err)
{
    const char *base = opt_str(o, "base");
    struct arch arch;
    char hash[65];
    struct st_file *f;
    ret_source[0] = '\0';
    if (base == NULL) {
        if (a->base_hash[0] != '\0')
            fprintf(stderr, "lorad: note: without --base FILE it is not checked that %s is what the "
                    "base of %s was made from\n", dir, a->label);
        return ERR_OK;
    }
    int rc = adapter_read_base(base, &arch, hash, err);
    if (rc == ERR_OK && a->base_hash[0] != '\0' && strcmp(a->base_hash, hash) != 0)
        rc = err_set(err, ERR_CONFLICT, "adapter %s was made for another base: %.12s..., not %.12s...",
                     a->label, a->base_hash, hash);
    if (rc == ERR_OK)
        rc = st_open(base, &f, err);
    if (rc != ERR_OK)
        return rc;
    const char *source = st_meta(f, "lorad.source");
    if (source != NULL && strlen(source) == 64)
        memcpy(ret_source, source, 65);
    else
        rc = err_set(err, ERR_INVALID, "%s does not say what it was made from", base);
    st_close(f);
    return rc;
}

static int merge(const struct opts *o, const char *dir, const char *out)
{
    struct adapter_arg a = { 0 };
    struct err err = { 0 };
    struct arch arch;
    char source[65] = "";
    int rc = merge_read_arch(dir, &arch, &err);
    if (rc == ERR_OK)
        rc = adapter_arg_open(o, opts_arg(o, 0), &arch, &a, &err);
    if (rc == ERR_OK)
        rc = check_base(o, &a, dir, source, &err);
    const struct merge_opts merge = { .dtype = opt_str(o, "dtype"), .progress = show,
                                      .source_hash = source[0] != '\0' ? source : NULL };
    if (rc == ERR_OK) {
        stop_catch();
        rc = adapter_merge(a.src, dir, out, &merge, &err);
    }
    if (rc == ERR_OK)
        printf("%s merged into %s, written to %s\n", a.label, dir, out);
    adapter_arg_close(&a);
    return rc == ERR_OK ? output_done() : db_fail(&err);
}

int adapter_merge_cmd(int argc, char **argv)
{
    static const struct opt options[] = {
        ADAPTER_ARG_OPTIONS,
        { "into", 0, "HF_DIR", NULL, "Hugging Face folder of the base, which is left as it is", false },
        { "out", 'o', "DIR", NULL, "folder to write, which must not exist", false },
        { "dtype", 0, "TYPE", NULL, "bf16, f16 or f32 (default: as in HF_DIR)", false },
        { .name = NULL },
    };
    int code;
    struct opts *o = opts_parse(
        argc, argv, options, "adapter merge NAME[@VERSION]|DIR --into HF_DIR -o OUT_DIR",
        "Adds an adapter to the weights of a Hugging Face folder: W += scaling * B A in fp32, rounded\n"
        "once.  Weight files, config and tokenizer keep their names.  With --base the folder must be\n"
        "the one that the base file was made from.",
        1, 1, &code);
    if (o == NULL)
        return code;
    const char *into = opt_str(o, "into"), *out = opt_str(o, "out");
    if (into == NULL || out == NULL)
        code = fail(2, into == NULL ? "say into what: --into HF_DIR" : "say where to: -o OUT_DIR");
    else
        code = merge(o, into, out);
    opts_free(o);
    return code;
}
