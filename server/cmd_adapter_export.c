/* cmd_adapter_export.c - `lorad adapter export`: an adapter for other programs. */
#include "server/cmd_adapter.h"

#include "engine/export.h"

#include <stdio.h>
#include <string.h>

static int to_lora(const struct adapter_src *a, const char *dir, struct err *err)
{
    struct adapter_src *plain = NULL;
    int rc = export_lora(a, &plain, err);
    if (rc == ERR_OK)
        rc = adapter_write_folder(plain, dir, err);
    if (rc == ERR_OK)
        printf("plain LoRA, rank %d-%d, %zu of %zu modules\n", plain->rank_min, plain->rank_max,
               plain->nmodules, a->nmodules);
    adapter_src_free(plain);
    return rc;
}

static int to_gguf(const struct opts *o, const struct adapter_src *a, const char *path,
                   struct err *err)
{
    struct arch arch;
    int rc = adapter_read_base(opt_str(o, "base"), &arch, NULL, err);
    if (rc == ERR_OK && file_exists(path))
        rc = err_set(err, ERR_CONFLICT, "%s is there already", path);
    return rc == ERR_OK ? export_gguf(&arch, a, path, err) : rc;
}

static int export(const struct opts *o, const char *as, const char *out)
{
    struct adapter_arg a = { 0 };
    struct err err = { 0 };
    int rc = adapter_arg_open(o, opts_arg(o, 0), NULL, &a, &err);
    if (rc == ERR_OK && strcmp(as, "peft") == 0)
        rc = adapter_write_folder(a.src, out, &err);
    else if (rc == ERR_OK && strcmp(as, "lora") == 0)
        rc = to_lora(a.src, out, &err);
    else if (rc == ERR_OK)
        rc = to_gguf(o, a.src, out, &err);
    if (rc == ERR_OK)
        printf("%s written to %s\n", a.label, out);
    adapter_arg_close(&a);
    return rc == ERR_OK ? output_done() : db_fail(&err);
}

int adapter_export(int argc, char **argv)
{
    static const struct opt options[] = {
        ADAPTER_ARG_OPTIONS,
        { "out", 'o', "PATH", NULL, "folder to write; with --as gguf the file", false },
        { "as", 0, "FORM", "peft", "peft, lora or gguf", false },
        { .name = NULL },
    };
    int code;
    struct opts *o = opts_parse(
        argc, argv, options, "adapter export NAME[@VERSION]|DIR -o PATH [--as peft|lora|gguf]",
        "Writes an adapter for other programs.  peft: as it was uploaded.  lora: the same change as\n"
        "plain LoRA, also of AdaLoRA (singular values go into B, ranks and alphas per module into\n"
        "rank_pattern and alpha_pattern).  gguf: a file for llama.cpp's --lora (needs --base).",
        1, 1, &code);
    if (o == NULL)
        return code;
    const char *as = opt_str(o, "as"), *out = opt_str(o, "out");
    const bool gguf = strcmp(as, "gguf") == 0;
    if (!gguf && strcmp(as, "peft") != 0 && strcmp(as, "lora") != 0)
        code = fail(2, "--as is peft, lora or gguf, not %s", as);
    else if (out == NULL)
        code = fail(2, "say where to: -o PATH");
    else if (gguf && opt_str(o, "base") == NULL)
        code = fail(2, "--as gguf needs to know the base's heads: --base FILE");
    else
        code = export(o, as, out);
    opts_free(o);
    return code;
}
