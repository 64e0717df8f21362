/* main.c - the table of subcommands. */
#include "server/cmd.h"
#include "server/options.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

const char lorad_version[] = LORAD_VERSION;

static int cmd_version(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    printf("lorad %s\n", lorad_version);
    return 0;
}

static const struct cmd commands[] = {
    { "serve", "serve a base and its adapters over HTTP", cmd_serve },
    { "import", "make a base file from a Hugging Face folder", cmd_import },
    { "pull", "download a model from the Hugging Face hub and make a base file of it", cmd_pull },
    { "quantize", "4-bit codes of a safetensors file, in the reference's form", cmd_quantize },
    { "tokenize", "text to token ids and back", cmd_tokenize },
    { "train", "train an adapter, without a server", cmd_train },
    { "eval", "how well the model and adapters predict the answers of a data file", cmd_eval },
    { "generate", "continue a prompt", cmd_generate },
    { "logits", "write the logits of a sequence of tokens", cmd_logits },
    { "perplexity", "how well the model predicts a text", cmd_perplexity },
    { "adapter", "add, list, show, compare, export, merge, promote and remove adapters", cmd_adapter },
    { "tenant", "add, list and remove tenants", cmd_tenant },
    { "key", "make, list and revoke access keys", cmd_key },
    { "bench", "measure this machine and this program", cmd_bench },
    { "check", "check the whole database for damage", cmd_check },
    { "version", "print the version", cmd_version },
};
enum { NCOMMANDS = sizeof commands / sizeof commands[0] };

static int usage(FILE *to, int code)
{
    fprintf(to, "lorad serves one 4-bit base model with thousands of LoRA and AdaLoRA adapters, and trains them.\n\n"
                "usage: lorad COMMAND [options]      lorad COMMAND --help\n\n");
    for (int i = 0; i < NCOMMANDS; i++)
        fprintf(to, "  %-12s %s\n", commands[i].name, commands[i].summary);
    return code;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage(stderr, 2);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)
        return usage(stdout, 0);
    if (strcmp(argv[1], "--version") == 0)
        return cmd_version(argc, argv);
    if (sodium_init() < 0)
        return fail(1, "the random number generator cannot be used");
    for (int i = 0; i < NCOMMANDS; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    fail(2, "there is no command %s", argv[1]);
    return usage(stderr, 2);
}
