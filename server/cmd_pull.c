/* cmd_pull.c - `lorad pull`: a model of the hub becomes a base file. */
#include "server/cmd.h"

#include "server/hub.h"
#include "server/options.h"
#include "server/stop.h"

#include "engine/base.h"
#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool show(void *ud, const char *tensor, size_t done, size_t total)
{
    (void)ud;
    (void)tensor;
    progress("importing", done, total);
    return stop_asked();
}

static void note(void *ud, const char *sentence)
{
    (void)ud;
    fprintf(stderr, "lorad: note: %s\n", sentence);
}

static int pull(const struct opts *o, const struct hub_ref *ref, const struct hub_opts *hub,
                const char *out)
{
    struct base_import_opts import = {
        .name = opt_str(o, "name") ? opt_str(o, "name") : ref->name,
        .type = opt_str(o, "type"), .head = opt_str(o, "head"), .embed = opt_str(o, "embed"),
        .progress = show, .note = note,
    };
    struct err err = { 0 };
    char *dir = NULL;
    stop_catch();
    int rc = hub_fetch(hub, ref, HUB_MODEL, &dir, &err);
    if (rc == ERR_OK)
        rc = base_import(dir, out, &import, &err);
    if (rc == ERR_OK)
        printf("%s: %s@%s; its files stay in %s\n", out, ref->repo, ref->rev, dir);
    free(dir);
    return rc == ERR_OK ? 0 : fail(1, "%s", err.msg);
}

int cmd_pull(int argc, char **argv)
{
    static const struct opt table[] = {
        { "output", 'o', "FILE", NULL, "the base file to write (default: NAME.base)", false },
        { "type", 0, "TYPE", "nf4", "as of lorad import, and so are head, embed and name", false },
        { "head", 0, "TYPE", NULL, "output head", false },
        { "embed", 0, "TYPE", NULL, "embedding", false },
        { "name", 0, "NAME", NULL, "what the model is called (default: NAME)", false },
        HUB_OPTIONS,
        { .name = NULL },
    };
    int code = 2;
    struct opts *o = opts_parse(
        argc, argv, table, "pull ORG/NAME[@REVISION] [-o FILE]",
        "Downloads what a base file is made from (config, tokenizer, safetensors) and imports it.\n"
        "Every file is checked against the hub's hash; a download that was cut off goes on where it\n"
        "ended.  HF_TOKEN is sent to the hub itself and to nobody else.",
        1, 1, &code);
    if (o == NULL)
        return code;
    struct hub_ref ref;
    struct hub_opts hub;
    struct err err = { 0 };
    char file[256];
    if (hub_ref_parse(opts_arg(o, 0), &ref, &err) != ERR_OK) {
        code = fail(2, "%s", err.msg);
    } else if (hub_opts_read(o, &hub)) {
        snprintf(file, sizeof file, "%s.base", ref.name);
        code = pull(o, &ref, &hub, opt_str(o, "output") ? opt_str(o, "output") : file);
    }
    opts_free(o);
    return code;
}
