/* test_bench_clients.c - the clients of `lorad bench` take a stream for whole only if it is: servers that
 * say one thing and hang up. */
#include "server/bench_stage.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

const char lorad_version[] = "0";

#define STREAM "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#define TOKEN "data: {\"choices\":[{\"text\":\"x\",\"finish_reason\":null}]}\n\n"
#define LAST(why) "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"" why "\"}]}\n\n"
#define END "data: [DONE]\n\n"
#define BROKEN "data: {\"error\":{\"message\":\"out of pages\"}}\n\n"

struct server {
    int fd;
    const char *head, *events; /* one chunk; NULL: none at all */
};

/* One request, one answer. */
static void *serve(void *arg)
{
    const struct server *s = arg;
    char piece[4096], answer[4096];
    const int fd = accept(s->fd, NULL, NULL);
    assert_true(fd >= 0);
    assert_true(recv(fd, piece, sizeof piece, 0) > 0);
    int n = s->events == NULL ? snprintf(answer, sizeof answer, "%s", s->head)
                              : snprintf(answer, sizeof answer, "%s%zx\r\n%s\r\n0\r\n\r\n", s->head,
                                         strlen(s->events), s->events);
    for (int i = 0; i < n; i += 7) /* in pieces, wherever they end */
        assert_true(send(fd, answer + i, (size_t)(n - i < 7 ? n - i : 7), MSG_NOSIGNAL) > 0);
    close(fd);
    return NULL;
}

/* What a client of two tokens says of it; events in *ret_events. */
static const char *outcome(const char *head, const char *events, int *ret_events)
{
    static struct err err;
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof at;
    struct server s = { .fd = socket(AF_INET, SOCK_STREAM, 0), .head = head, .events = events };
    struct stage_client c = { .model = "m", .prompt_tokens = 3, .max_tokens = 2 };
    pthread_t thread;
    err = (struct err){ 0 };
    assert_int_equal(bind(s.fd, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(s.fd, 1), 0);
    assert_int_equal(getsockname(s.fd, (struct sockaddr *)&at, &len), 0);
    assert_int_equal(pthread_create(&thread, NULL, serve, &s), 0);
    const int rc = stage_clients(ntohs(at.sin_port), &c, 1, 1, &err);
    pthread_join(thread, NULL);
    close(s.fd);
    *ret_events = rc == ERR_OK ? c.events : -1;
    if (rc == ERR_OK)
        stage_clients_free(&c, 1);
    return rc == ERR_OK ? "" : err.msg;
}

static void whole_streams_and_others(void **state)
{
    (void)state;
    static const struct {
        const char *head, *events, *said; /* said: in the error; NULL: none */
        int n;
    } cases[] = {
        { STREAM, TOKEN TOKEN LAST("length") END, NULL, 2 },
        { STREAM, TOKEN LAST("length") END, NULL, 1 },
        { STREAM, LAST("length") END, NULL, 1 },
        { STREAM, TOKEN TOKEN LAST("length"), "without [DONE]", -1 },
        { STREAM, TOKEN LAST("stop") END, "without all its tokens", -1 },
        { STREAM, TOKEN END, "without all its tokens", -1 },
        { STREAM, "\n", "without all its tokens", -1 },
        { STREAM, TOKEN BROKEN, "broke: out of pages", -1 },
        { STREAM, BROKEN, "broke: out of pages", -1 },
        { STREAM "8\r\ndata", NULL, "before its end", -1 },
        { "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 33\r\n\r\n{\"error\":{\"message\":\"too many\"}}\n\n", NULL,
          "refused a stream for m: too many", -1 },
        { "HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops", NULL, "refused a stream for m: oops", -1 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int n;
        const char *said = outcome(cases[i].head, cases[i].events, &n);
        if (cases[i].said == NULL ? said[0] != '\0' : strstr(said, cases[i].said) == NULL)
            fail_msg("case %zu: %s", i, said);
        assert_int_equal(n, cases[i].n);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(whole_streams_and_others) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
