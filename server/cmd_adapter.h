/* cmd_adapter.h - what the files of `lorad adapter` share.  One thread. */
#ifndef SERVER_CMD_ADAPTER_H
#define SERVER_CMD_ADAPTER_H

#include "engine/adapter.h"
#include "server/cmd_db.h"

#define OPT_TENANT { "tenant", 0, "NAME", "default", "whose adapter", false }
/* For commands that take a version of the database or a folder. */
#define ADAPTER_ARG_OPTIONS                                                                       \
    { "db", 0, "FILE", NULL, "the database; a folder's name then begins with . or /", false },    \
    OPT_TENANT,                                                                                   \
    { "base", 'b', "FILE", NULL, "base file that a folder's adapter is for", false }

/* An adapter as an argument names it. */
struct adapter_arg {
    struct adapter_src *src;
    char base_hash[65]; /* of the base it is bound to; empty for a folder */
    char label[STORE_NAME_MAX + 32]; /* NAME@V, or the end of the folder's name */
};

/* NAME[@V] with --db (or LORAD_DB), else a folder, which is checked against `arch`, or against
 * --base if that is NULL. */
int adapter_arg_open(const struct opts *o, const char *ref, const struct arch *arch,
                     struct adapter_arg *ret, struct err *err);
void adapter_arg_close(struct adapter_arg *a);
/* Does `ref` mean a folder? */
bool adapter_arg_is_dir(const struct opts *o, const char *ref);
/* Architecture and hash of a base file; its weights stay unread.  ret_hash may be NULL. */
int adapter_read_base(const char *path, struct arch *ret_arch, char ret_hash[65], struct err *err);

/* PEFT's two files.  Nothing that is there is overwritten, and a failure leaves neither file. */
int adapter_write_folder(const struct adapter_src *a, const char *dir, struct err *err);

/* The chart that `lorad adapter show` prints: rank and norm per layer and module.  `norm` may be
 * NULL. */
void adapter_chart(const struct adapter_src *a, const double *norm);

/* Subcommands in files of their own. */
int adapter_diff(int argc, char **argv);   /* cmd_adapter_diff.c */
int adapter_export(int argc, char **argv); /* cmd_adapter_export.c */
int adapter_merge_cmd(int argc, char **argv); /* cmd_adapter_merge.c */

#endif
