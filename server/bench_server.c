/* bench_server.c - a server of its own for the parts of `lorad bench` that need one, and single requests
 * to it. */
#include "server/bench_stage.h"

#include "engine/kv.h"
#include "engine/util.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

enum { ARGS_MAX = 32, START_SECONDS = 120, END_SECONDS = 60, ANSWER_MAX = 256 << 20 };

static void nap(double seconds)
{
    nanosleep(&(struct timespec){ .tv_nsec = (long)(seconds * 1e9) }, NULL);
}

/* The environment without LORAD_ variables, which are options of a server: the bench says all of them.
 * NULL: no memory; free() it. */
static char **plain_environment(void)
{
    size_t n = 0, kept = 0;
    while (environ[n] != NULL)
        n++;
    char **env = malloc((n + 1) * sizeof *env);
    for (size_t i = 0; env != NULL && i < n; i++)
        if (strncmp(environ[i], "LORAD_", 6) != 0)
            env[kept++] = environ[i];
    if (env != NULL)
        env[kept] = NULL;
    return env;
}

/* In the child, between fork and exec: nothing that takes a lock. */
static _Noreturn void become_server(int log, pid_t parent, char **argv, char **env)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(127); /* it ended before it could be said */
    setpgid(0, 0); /* Ctrl-C is this program's business; when it ends, so does the server */
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    execve("/proc/self/exe", argv, env);
    _exit(127);
}

/* The port that it says it listens on; 0: not yet. */
static int port_in(const char *log)
{
    static const char mark[] = "listening  http://127.0.0.1:";
    char *text = NULL;
    size_t len;
    if (file_read(log, 1 << 20, &text, &len, NULL) != ERR_OK)
        return 0;
    const char *p = strstr(text, mark);
    const int port = p != NULL && strchr(p, '\n') != NULL ? atoi(p + sizeof mark - 1) : 0;
    free(text);
    return port;
}

static int did_not_start(const struct stage_server *v, struct err *err)
{
    char *text = NULL;
    size_t len;
    file_read(v->log.s, 1 << 20, &text, &len, NULL);
    if (text != NULL && len > 0 && text[len - 1] == '\n')
        text[len - 1] = '\0';
    const int rc = err_set(err, ERR_UNAVAILABLE, "the server did not start: %.150s", text ? text : "");
    free(text);
    return rc;
}

int stage_serve(struct bench *b, const struct stage *s, const char *base, const char *db,
                const char *const *more, struct stage_server *ret, struct err *err)
{
    char threads[16];
    snprintf(threads, sizeof threads, "%d", pool_threads(b->compute.pool));
    const char *args[ARGS_MAX] = { "lorad", "serve", "--base", base, "--db", db, "--port", "0", "--threads",
                                   threads, "--kernel", isa_name(b->compute.isa), "--precision",
                                   b->precisions[PREC_FAST] ? "fast" : "exact" };
    int n = 14;
    for (; *more != NULL && n + 1 < ARGS_MAX; more++)
        args[n++] = *more;
    *ret = (struct stage_server){ .log = stage_path(s, "server.log") };
    unlink(ret->log.s);
    const int log = open(ret->log.s, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log < 0)
        return err_set(err, ERR_IO, "%s: %s", ret->log.s, strerror(errno));
    char **env = plain_environment();
    if (env == NULL) {
        close(log);
        return err_nomem(err);
    }
    const double began = now_mono();
    const pid_t self = getpid();
    ret->pid = fork();
    if (ret->pid == 0)
        become_server(log, self, (char **)(uintptr_t)args, env);
    close(log);
    free(env);
    if (ret->pid < 0) {
        ret->pid = 0;
        return err_set(err, ERR_UNAVAILABLE, "no process for a server: %s", strerror(errno));
    }
    while ((ret->port = port_in(ret->log.s)) == 0) {
        if (waitpid(ret->pid, NULL, WNOHANG) == ret->pid) {
            ret->pid = 0;
            return did_not_start(ret, err);
        }
        if (now_mono() - began > START_SECONDS) {
            stage_serve_end(b, ret);
            return did_not_start(ret, err);
        }
        nap(0.001);
    }
    ret->start_seconds = now_mono() - began;
    b->child = ret->pid;
    return ERR_OK;
}

void stage_serve_end(struct bench *b, struct stage_server *v)
{
    if (v->pid == 0)
        return;
    b->child = 0;
    const double began = now_mono();
    kill(v->pid, SIGTERM);
    while (waitpid(v->pid, NULL, WNOHANG) == 0) {
        if (now_mono() - began > END_SECONDS)
            kill(v->pid, SIGKILL);
        nap(0.002);
    }
    v->pid = 0;
}

size_t stage_kv_bytes(const struct arch *arch, int sequences, int tokens)
{
    const size_t least = (size_t)512 << 20, page = kv_page_bytes(arch, kv_type_default(false));
    const size_t one = (size_t)kv_pages_for(tokens > STAGE_CONTEXT ? tokens : STAGE_CONTEXT);
    const size_t all = (size_t)sequences * ((size_t)kv_pages_for(tokens) + 1);
    const size_t bytes = page * (all > one ? all : one);
    return bytes > least ? bytes : least;
}

size_t stage_serve_resident(const struct stage_server *v)
{
    char path[64];
    unsigned long long all = 0, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)v->pid);
    FILE *f = fopen(path, "re");
    if (f != NULL && fscanf(f, "%llu %llu", &all, &resident) != 2)
        resident = 0;
    if (f != NULL)
        fclose(f);
    return (size_t)resident * (size_t)sysconf(_SC_PAGESIZE);
}

/* --- one request -------------------------------------------------------------------------------- */

int stage_connect(int port, struct err *err)
{
    const struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                    .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)&at, sizeof at) == 0)
        return fd;
    err_set(err, ERR_IO, "no connection to the server: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return -1;
}

int stage_send(int fd, const void *data, size_t len, struct err *err)
{
    const char *p = data;
    while (len > 0) {
        const ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err_set(err, ERR_IO, "cannot send to the server: %s", strerror(errno));
        p += n;
        len -= (size_t)n;
    }
    return ERR_OK;
}

/* Everything until the server closes the connection. */
static int read_all(int fd, struct buf *b, struct err *err)
{
    char piece[16384];
    ssize_t n;
    while ((n = read(fd, piece, sizeof piece)) > 0 || (n < 0 && errno == EINTR))
        if (n > 0 && buf_add(b, piece, (size_t)n) != ERR_OK)
            return err_nomem(err);
    return n == 0 ? ERR_OK : err_set(err, ERR_IO, "the server's answer: %s", strerror(errno));
}

/* Status and body of an answer that is no stream. */
static int take_answer(struct buf *b, int *ret_status, char **ret, struct err *err)
{
    const char *body = b->data != NULL ? strstr(b->data, "\r\n\r\n") : NULL;
    int status = 0;
    if (body == NULL || sscanf(b->data, "HTTP/1.1 %d", &status) != 1)
        return err_set(err, ERR_IO, "the server's answer is no HTTP");
    if (ret_status == NULL && status / 100 != 2)
        return err_set(err, ERR_IO, "the server answered %d: %.120s", status, body + 4);
    if (ret_status != NULL)
        *ret_status = status;
    *ret = strdup(body + 4);
    return *ret != NULL ? ERR_OK : err_nomem(err);
}

int stage_ask(int port, const char *method, const char *path, const char *type, const char *body,
              int *ret_status, char **ret, struct err *err)
{
    struct buf b;
    const int fd = stage_connect(port, err);
    if (fd < 0)
        return ERR_IO;
    buf_init(&b, ANSWER_MAX);
    int rc = buf_printf(&b, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", method, path);
    if (rc == ERR_OK && body != NULL)
        rc = buf_printf(&b, "Content-Type: %s\r\nContent-Length: %zu\r\n", type, strlen(body));
    if (rc == ERR_OK)
        rc = buf_puts(&b, "\r\n");
    if (rc == ERR_OK && body != NULL)
        rc = buf_puts(&b, body);
    rc = rc == ERR_OK ? stage_send(fd, b.data, b.len, err) : err_nomem(err);
    b.len = 0;
    if (rc == ERR_OK)
        rc = read_all(fd, &b, err);
    if (rc == ERR_OK)
        rc = take_answer(&b, ret_status, ret, err);
    buf_free(&b);
    close(fd);
    return rc;
}
