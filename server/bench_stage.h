/* bench_stage.h - what the parts of `lorad bench` that serve need: a folder that goes away, adapters of
 * random numbers in a database, a server, and clients that read streams.
 *
 * One thread.  Functions return an ERR_ code with a sentence. */
#ifndef SERVER_BENCH_STAGE_H
#define SERVER_BENCH_STAGE_H

#include "engine/adapter.h"
#include "server/bench.h"
#include "store/store.h"

#include <limits.h>
#include <sys/types.h>

/* --- a folder (bench_stage.c) ---------------------------------------------------------------- */
/* Under TMPDIR or /tmp.  It is removed by stage_close(), and by a process that waits for this one to
 * end if it never gets there: SIGINT, a crash and kill -9 leave nothing behind. */
struct stage {
    char dir[PATH_MAX / 2];
    int guard;               /* held open: the other end sees when this process is gone */
    pid_t guard_pid;
};
int stage_open(struct stage *s, struct err *err);
void stage_close(struct stage *s);
/* DIR/NAME */
struct stage_path { char s[PATH_MAX]; };
struct stage_path stage_path(const struct stage *s, const char *name);
/* Whether so much is free, of the disk where the folder lies and of memory; if not, skips `id`. */
bool stage_room(struct bench *b, const struct stage *s, const char *id, size_t disk, size_t memory);
/* run() for each wanted shape, in one folder, where there is room for so many copies of its base on the
 * disk, and in memory with so many bytes more; others are skipped as PART.SHAPE. */
int stage_each_shape(struct bench *b, int on_disk, int in_memory, size_t more,
                     int (*run)(struct bench *b, const struct stage *s, const struct synthetic_shape *shape,
                                struct err *err),
                     struct err *err);
/* A database with what belongs to it. */
void stage_remove_db(const char *db);

/* --- models and adapters ---------------------------------------------------------------------- */
/* tokenizer.json: the 256 bytes, then made-up words up to V >= 256, so that a text of n ASCII characters
 * without spaces is n tokens and every other token has text of its own.  free() it; NULL when memory is
 * out (bench_words.c). */
char *stage_tokenizer(int V);
/* A synthetic base, and the same as a file with that tokenizer; synthetic_free() it. */
int stage_base(const struct synthetic_shape *shape, const char *path, struct base **ret, struct err *err);
/* Which modules are adapted. */
enum stage_modules { STAGE_QV, STAGE_ATTENTION, STAGE_ALL };
/* A LoRA of random BF16 numbers; other seeds have other content. */
int stage_adapter(const struct arch *arch, enum stage_modules which, int rank, uint64_t seed,
                  struct adapter_src **ret, struct err *err);
/* Its name in a database: "a00042". */
struct stage_name { char s[STORE_NAME_MAX + 1]; };
struct stage_name stage_name(int i);
/* Put adapters first .. first + n - 1 into the database, live, bound to the base. */
int stage_fill(const struct base *base, const char *db, enum stage_modules which, int rank, int first, int n,
               struct err *err);

/* --- a server (bench_server.c) ---------------------------------------------------------------- */
/* `lorad serve` of this very program, on a free port of the loopback.  It ends with this process. */
struct stage_server {
    pid_t pid;
    int port;
    double start_seconds;    /* until it listens */
    struct stage_path log;
};
/* With the bench's threads, kernels and (the first wanted) precision, and nothing that LORAD_ variables
 * say; `more`: further arguments, NULL-terminated.  Its CPU time counts as the bench's. */
int stage_serve(struct bench *b, const struct stage *s, const char *base, const char *db,
                const char *const *more, struct stage_server *ret, struct err *err);
void stage_serve_end(struct bench *b, struct stage_server *v); /* SIGTERM; a pid of 0 is fine */
size_t stage_serve_resident(const struct stage_server *v);
/* What --context is to be, and --kv for so many sequences of so many tokens; 512 MiB at least. */
enum { STAGE_CONTEXT = 512 };
size_t stage_kv_bytes(const struct arch *arch, int sequences, int tokens);
/* A connection to it; -1 after a failure. */
int stage_connect(int port, struct err *err);
/* All of it; a server that has ended is an error and no signal. */
int stage_send(int fd, const void *data, size_t len, struct err *err);
/* One request with its whole answer, NUL-terminated (free() it); *ret_status may be NULL. */
int stage_ask(int port, const char *method, const char *path, const char *type, const char *body,
              int *ret_status, char **ret, struct err *err);

/* --- many numbers of a kind (bench_stage.c) ---------------------------------------------------- */
struct stage_samples {
    double *v;
    size_t n, cap;
};
int stage_sample(struct stage_samples *s, double v, struct err *err);
/* The least sample that so many percent are not above; 0 without samples.  Sorts them. */
double stage_percentile(struct stage_samples *s, double percent);
void stage_samples_free(struct stage_samples *s);

/* --- clients (bench_clients.c) ----------------------------------------------------------------- */
/* All send one request each at the same moment and read their streams to the end, in one thread. */
struct stage_client {
    const char *model;
    int prompt_tokens, max_tokens;
    /* what came of it, by now_mono(); event i came at at[i] and carried a token or more */
    double sent;
    int events;
    double *at;              /* [max_tokens] */
};
/* Allocates `at`; stage_clients_free() it.  `seed` chooses prompts that no other seed has. */
int stage_clients(int port, struct stage_client *c, int n, uint64_t seed, struct err *err);
void stage_clients_free(struct stage_client *c, int n);

#endif
