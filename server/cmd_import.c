/* cmd_import.c - `lorad import`: a Hugging Face folder or a GGUF file becomes one base file.
 *
 * SIGINT and SIGTERM only set a flag; the import looks at it between tensors, removes what it has
 * written and ends with an error, so that no half file is left. */
#include "engine/base.h"
#include "engine/util.h"
#include "server/cmd.h"
#include "server/options.h"
#include "server/stop.h"

#include <stdio.h>
#include <sys/stat.h>

static bool show(void *ud, const char *tensor, size_t done, size_t total)
{
    (void)tensor;
    progress(ud, done, total);
    return stop_asked();
}

static void note(void *ud, const char *sentence)
{
    (void)ud;
    fprintf(stderr, "lorad: note: %s\n", sentence);
}

static int run(const struct opts *o, const char *dir, const char *out)
{
    struct base_import_opts import = {
        .name = opt_str(o, "name"),
        .type = opt_str(o, "type"),
        .head = opt_str(o, "head"),
        .embed = opt_str(o, "embed"),
        .chat_template = opt_str(o, "chat-template"),
        .requantize = opt_flag(o, "requantize"),
        .progress = show,
        .note = note,
        .ud = (void *)"importing",
    };
    struct err err = { 0 };
    double begin = now_mono();
    stop_catch();
    if (base_import(dir, out, &import, &err) != ERR_OK)
        return fail(1, "%s", err.msg);
    size_t resident = 0;
    struct stat st;
    char file[32], memory[32];
    if (stat(out, &st) != 0 || base_size(out, &resident, &err) != ERR_OK)
        return fail(1, "%s: %s", out, err.code ? err.msg : "cannot be read again");
    printf("%s: %s on disk, %s in memory, made in %.1f s\n", out,
           human_bytes((size_t)st.st_size, file), human_bytes(resident, memory),
           now_mono() - begin);
    return 0;
}

int cmd_import(int argc, char **argv)
{
    static const struct opt table[] = {
        { "output", 'o', "FILE", NULL, "the base file to write (required)", false },
        { "type", 0, "TYPE", "nf4", "linear layers: nf4, or f32 (unquantised, for tests)", false },
        { "head", 0, "TYPE", NULL, "output head: 8bit (default of nf4), bf16, f32 (default of f32), nf4",
          false },
        { "embed", 0, "TYPE", NULL, "embedding: bf16 (default of nf4) or f32 (default of f32)", false },
        { "requantize", 0, NULL, NULL, "let 4-bit weights that are not NF4 be quantised a second time", false },
        { "name", 0, "NAME", NULL, "what the model is called (default: the folder's name)", false },
        { "chat-template", 0, "FILE", NULL, "keep this template instead of the model's own", false },
        { NULL, 0, NULL, NULL, NULL, false },
    };
    int code = 2;
    struct opts *o = opts_parse(
        argc, argv, table, "import FOLDER_OR_GGUF -o FILE",
        "Reads a Hugging Face folder (config.json, model.safetensors or its shards, tokenizer.json)\n"
        "or a GGUF file and writes one file with everything that serving needs.  A source that is not understood\n"
        "in full is refused, naming the tensor or the field.",
        1, 1, &code);
    if (o == NULL)
        return code;
    const char *out = opt_str(o, "output");
    code = out ? run(o, opts_arg(o, 0), out) : fail(2, "import needs -o FILE");
    opts_free(o);
    return code;
}
