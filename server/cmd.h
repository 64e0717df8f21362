/* cmd.h - the subcommands of lorad, one file each (cmd_*.c); the table is in main.c. */
#ifndef SERVER_CMD_H
#define SERVER_CMD_H

struct cmd {
    const char *name;
    const char *summary;
    /* argv[0] is the subcommand's name.  Returns the exit code: 0 done, 1 failed, 2 usage. */
    int (*run)(int argc, char **argv);
};

extern const char lorad_version[];

int cmd_serve(int argc, char **argv);      /* cmd_serve.c */
int cmd_import(int argc, char **argv);     /* cmd_import.c */
int cmd_pull(int argc, char **argv);       /* cmd_pull.c */
int cmd_quantize(int argc, char **argv);   /* cmd_quantize.c */
int cmd_tokenize(int argc, char **argv);   /* cmd_tokenize.c */
int cmd_generate(int argc, char **argv);   /* cmd_generate.c */
int cmd_train(int argc, char **argv);      /* cmd_train.c */
int cmd_eval(int argc, char **argv);       /* cmd_eval.c */
int cmd_logits(int argc, char **argv);     /* cmd_inspect.c */
int cmd_perplexity(int argc, char **argv); /* cmd_inspect.c */
int cmd_adapter(int argc, char **argv);    /* cmd_adapter.c */
int cmd_tenant(int argc, char **argv);     /* cmd_tenant.c */
int cmd_key(int argc, char **argv);        /* cmd_tenant.c */
int cmd_bench(int argc, char **argv);      /* cmd_bench.c */
int cmd_check(int argc, char **argv);      /* cmd_adapter.c */

#endif
