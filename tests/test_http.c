/* test_http.c - the server on real sockets: bodies in pieces, clients that leave, dawdle or flood. */
#include "server/http.h"
#include "tests/support_serve.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

enum { PATIENCE_MS = 120000 }; /* sanitizers make the engine slow */

struct fixture {
    struct serve *s;
    struct http *h;
    int port;
};

static void start(struct fixture *f, const struct serve_opts *so, struct http_opts ho)
{
    struct err err = { 0 };
    int fd;
    bool loopback;
    f->s = serve_open(so);
    ho.api = f->s->api;
    ho.db_path = f->s->db_path;
    if (http_listen("127.0.0.1", 0, &fd, &f->port, &loopback, &err) != ERR_OK ||
        http_start(&ho, fd, &f->h, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_true(loopback);
}

static void stop(struct fixture *f)
{
    http_stop(f->h, 0);
    serve_close(f->s);
}

static int setup(void **state)
{
    static struct fixture f;
    start(&f, &(struct serve_opts){ .max_json = 64 << 10 }, (struct http_opts){ 0 });
    serve_add_adapter(f.s, STORE_TENANT_DEFAULT, "shakespeare", DEMO_ADAPTER("shakespeare"));
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    stop(*state);
    return 0;
}

/* --- a client that does what it is told -------------------------------------------------------------- */

static int dial(const struct fixture *f)
{
    const struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)f->port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

static bool send_bytes(int fd, const char *data, size_t len)
{
    while (len > 0) {
        const ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        data += n;
        len -= (size_t)n;
    }
    return true;
}

static bool send_text(int fd, const char *text) { return send_bytes(fd, text, strlen(text)); }

static void send_post(int fd, const char *path, const char *body)
{
    char head[300];
    snprintf(head, sizeof head,
             "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
             "Content-Length: %zu\r\n\r\n", path, strlen(body));
    assert_true(send_text(fd, head));
    assert_true(send_text(fd, body));
}

/* Bytes until `until` was seen, the server closes, or PATIENCE_MS. */
static void read_until(int fd, const char *until, struct buf *b)
{
    char piece[4096];
    while (until == NULL || b->data == NULL || strstr(b->data, until) == NULL) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        if (poll(&p, 1, PATIENCE_MS) <= 0)
            fail_msg("the server said nothing; so far: %s", b->data ? b->data : "");
        const ssize_t n = recv(fd, piece, sizeof piece, 0);
        if (n <= 0)
            return;
        assert_int_equal(buf_add(b, piece, (size_t)n), ERR_OK);
    }
}

/* One answer with a Content-Length; the status.  0: the connection was closed without one. */
static int read_answer(int fd, struct buf *b)
{
    b->len = 0;
    if (b->data != NULL)
        b->data[0] = '\0';
    /* byte by byte up to the body, so that a pipelined answer stays in the socket */
    char c;
    while (b->data == NULL || strstr(b->data, "\r\n\r\n") == NULL) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        if (poll(&p, 1, PATIENCE_MS) <= 0)
            fail_msg("no answer");
        if (recv(fd, &c, 1, 0) != 1)
            return 0;
        buf_add(b, &c, 1);
    }
    const char *length = strcasestr(b->data, "Content-Length: ");
    size_t left = length ? strtoul(length + 16, NULL, 10) : 0;
    while (left > 0 && recv(fd, &c, 1, 0) == 1) {
        buf_add(b, &c, 1);
        left--;
    }
    return atoi(b->data + 9);
}

static int ask(int fd, const char *path, const char *body, struct buf *b)
{
    send_post(fd, path, body);
    return read_answer(fd, b);
}

/* Until the engine has nothing left to do. */
static bool engine_idle(const struct fixture *f)
{
    for (int i = 0; i < PATIENCE_MS / 10; i++) {
        struct sched_stats st;
        sched_stats(f->s->sched, &st);
        if (st.running == 0 && st.waiting == 0)
            return true;
        usleep(10000);
    }
    return false;
}

static void wait_running(const struct fixture *f)
{
    struct sched_stats st;
    do {
        usleep(500);
        sched_stats(f->s->sched, &st);
    } while (st.running == 0);
}

/* Until the spool folder has n files. */
static void wait_spooled(const struct fixture *f, int n)
{
    for (int i = 0; i < 2000 && serve_spooled(f->s) != n; i++)
        usleep(5000);
    assert_int_equal(serve_spooled(f->s), n);
}

static bool alive(const struct fixture *f)
{
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(f);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    const int status = read_answer(fd, &b);
    close(fd);
    buf_free(&b);
    return status == 200;
}

/* 100 sequences of 480 tokens: seconds of work. */
#define LONG "{\"prompt\":\"a\",\"n\":100,\"max_tokens\":480,\"ignore_eos\":true"
#define TOKENIZE "{\"content\":\"It was a dark night\"}"

/* --- bodies ------------------------------------------------------------------------------------------- */

static void a_request_may_come_byte_by_byte(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(f);
    const char *text = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33\r\n\r\n" TOKENIZE;
    assert_int_equal(strlen(TOKENIZE), 33);
    for (const char *p = text; *p != '\0'; p++) {
        assert_true(send_bytes(fd, p, 1));
        if ((p - text) % 16 == 0)
            usleep(500);
    }
    assert_int_equal(read_answer(fd, &b), 200);
    assert_non_null(strstr(b.data, "\"tokens\""));
    close(fd);
    buf_free(&b);
}

static void a_chunked_body_is_a_body(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                  "5\r\n{\"con\r\n");
    usleep(5000);
    send_text(fd, "a;why=not\r\ntent\":\"hi\"\r\n1\r\n}\r\n0\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 200);
    close(fd);
    buf_free(&b);
}

static void a_body_over_the_limit_is_413_announced_or_not(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    /* announced and small enough to be swallowed: the answer comes after it */
    char *big = malloc(100001);
    memset(big, ' ', 100000);
    big[100000] = '\0';
    int fd = dial(f);
    assert_int_equal(ask(fd, "/tokenize", big, &b), 413);
    assert_non_null(strstr(b.data, "64.0 KiB"));
    close(fd);
    /* announced and huge: the answer comes at once */
    fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 413);
    close(fd);
    /* not announced */
    fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 10; i++) {
        send_text(fd, "2710\r\n");
        send_bytes(fd, big, 10000);
        send_text(fd, "\r\n");
    }
    send_text(fd, "0\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 413);
    close(fd);
    /* without end: cut off */
    fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    bool sent = true;
    for (int i = 0; i < 3000 && sent; i++)
        sent = send_text(fd, "2710\r\n") && send_bytes(fd, big, 10000) && send_text(fd, "\r\n");
    assert_false(sent);
    close(fd);
    free(big);
    buf_free(&b);
    assert_true(alive(f));
}

static void a_client_that_expects_100_gets_the_refusal_instead(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    int fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
                  "Expect: 100-continue\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 413);
    close(fd);
    fd = dial(f);
    send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33\r\n"
                  "Expect: 100-continue\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 100);
    send_text(fd, TOKENIZE);
    assert_int_equal(read_answer(fd, &b), 200);
    close(fd);
    buf_free(&b);
}

static void pipelined_requests_are_answered_in_order(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(f);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
                  "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33\r\n\r\n" TOKENIZE
                  "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
                  "HEAD /ready HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 200);
    assert_non_null(strstr(b.data, "\"ok\""));
    assert_int_equal(read_answer(fd, &b), 200);
    assert_non_null(strstr(b.data, "tokens"));
    assert_int_equal(read_answer(fd, &b), 404);
    b.data[b.len = 0] = '\0';
    read_until(fd, "\r\n\r\n", &b);
    assert_non_null(strstr(b.data, "200 OK"));
    assert_null(strstr(b.data, "ready\""));
    close(fd);
    buf_free(&b);
}

static void a_wrong_method_leaves_the_connection_usable(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(f);
    assert_int_equal(ask(fd, "/v1/models", "{\"a\":1}", &b), 405);
    assert_non_null(strstr(b.data, "Allow: GET, HEAD"));
    assert_int_equal(ask(fd, "/tokenize", TOKENIZE, &b), 200);
    close(fd);
    buf_free(&b);
}

static void floods_and_nonsense_do_not_stop_the_server(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 4 << 20);
    int fd = dial(f);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n");
    bool sent = true;
    for (int i = 0; i < 20000 && sent; i++)
        sent = send_text(fd, "X-Flood: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n");
    const int status = read_answer(fd, &b);
    assert_true(status == 0 || status == 431 || status == 413 || status == 400);
    close(fd);
    static const char *const nonsense[] = {
        "\r\n\r\n\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "GET / HTTP/9.9\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        "GET /%00%ff%zz?%=&=&a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof nonsense / sizeof nonsense[0]; i++) {
        fd = dial(f);
        send_text(fd, nonsense[i]);
        shutdown(fd, SHUT_WR);
        b.len = 0;
        read_until(fd, NULL, &b);
        close(fd);
        assert_true(alive(f));
    }
    buf_free(&b);
}

/* --- uploads -------------------------------------------------------------------------------------------- */

static void add_file(struct buf *b, const char *field, const char *path)
{
    char *data;
    size_t len;
    struct err err = { 0 };
    assert_int_equal(file_read(path, 1 << 24, &data, &len, &err), ERR_OK);
    buf_printf(b, "--XX\r\nContent-Disposition: form-data; name=\"%s\"; filename=\"f\"\r\n\r\n", field);
    buf_add(b, data, len);
    buf_puts(b, "\r\n");
    free(data);
}

static int send_form(const struct fixture *f, const struct buf *form, struct buf *b)
{
    char head[300];
    const int fd = dial(f);
    snprintf(head, sizeof head, "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
             "multipart/form-data; boundary=XX\r\nContent-Length: %zu\r\n\r\n", form->len);
    send_text(fd, head);
    send_bytes(fd, form->data, form->len);
    const int status = read_answer(fd, b);
    close(fd);
    return status;
}

/* Two servers that read the same bytes differently can be made to answer the wrong person. */
static void a_body_whose_end_is_not_clear_is_refused(void **state)
{
    static const char *const heads[] = {
        "Content-Length: 5\r\nContent-Length: 30\r\n\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        "Transfer-Encoding: gzip\r\n\r\n",
    };
    struct buf b;
    buf_init(&b, 1 << 20);
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++) {
        const int fd = dial(*state);
        send_text(fd, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\n");
        send_text(fd, heads[i]);
        send_text(fd, "{\"a\"}GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_int_equal(read_answer(fd, &b), 400);
        assert_non_null(strstr(b.data, "Content-Length"));
        char c;
        assert_true(recv(fd, &c, 1, 0) <= 0); /* and nothing after it is taken for a request */
        close(fd);
    }
    buf_free(&b);
}

static void a_nul_in_a_path_does_not_make_it_another(void **state)
{
    struct buf b;
    buf_init(&b, 1 << 20);
    const int fd = dial(*state);
    send_text(fd, "GET /v1/models/shakespeare%00x HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 404);
    send_text(fd, "GET /v1/models/shakespeare HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_int_equal(read_answer(fd, &b), 200);
    close(fd);
    buf_free(&b);
}

static void forms_are_taken_whole_or_not_at_all(void **state)
{
    struct fixture *f = *state;
    struct buf form, b;
    buf_init(&form, 16 << 20);
    buf_init(&b, 1 << 20);
    buf_puts(&form, "--XX\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\npoet\r\n");
    add_file(&form, "config", DEMO_ADAPTER("whitman") "/adapter_config.json");
    add_file(&form, "weights", DEMO_ADAPTER("whitman") "/adapter_model.safetensors");
    const size_t complete = form.len;
    buf_puts(&form, "--XX--\r\n");
    assert_int_equal(send_form(f, &form, &b), 201);
    assert_non_null(strstr(b.data, "\"poet@1\""));

    /* what comes after the end is nobody's: nothing, an empty line, anything */
    static const char *const ends[] = { "--XX--", "--XX--\r\n\r\n", "--XX--\r\nbye\r\n--XX\r\n" };
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        form.len = complete;
        buf_puts(&form, ends[i]);
        assert_int_equal(send_form(f, &form, &b), 200);
    }
    /* wherever the end is cut into pieces on its way */
    static const char small[] = "--XX\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\n"
                                "-\r\n--X\r\n\r\n--XX--\r\n\r\n";
    for (size_t cut = sizeof small - 14; cut < sizeof small - 1; cut++) {
        const int fd = dial(f);
        char head[200];
        snprintf(head, sizeof head, "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                 "multipart/form-data; boundary=\"XX\"\r\nContent-Length: %zu\r\n\r\n",
                 sizeof small - 1);
        send_text(fd, head);
        send_bytes(fd, small, cut);
        usleep(20000);
        send_bytes(fd, small + cut, sizeof small - 1 - cut);
        assert_int_equal(read_answer(fd, &b), 400);
        assert_non_null(strstr(b.data, "no part `config`"));
        close(fd);
    }

    form.len = complete - 1000; /* cut inside the weights */
    assert_int_equal(send_form(f, &form, &b), 400);
    assert_non_null(strstr(b.data, "middle of a part"));
    form.len = complete;
    add_file(&form, "weights", DEMO_ADAPTER("whitman") "/adapter_config.json");
    buf_puts(&form, "--XX--\r\n");
    assert_int_equal(send_form(f, &form, &b), 400);
    assert_non_null(strstr(b.data, "more than one part `weights`"));
    form.len = 0;
    buf_puts(&form, "--XX\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\n\r\n--XX--\r\n");
    assert_int_equal(send_form(f, &form, &b), 400);
    form.len = 0;
    buf_puts(&form, "no boundary anywhere");
    assert_int_equal(send_form(f, &form, &b), 400);
    form.len = 0;
    for (int i = 0; i < 40; i++)
        buf_printf(&form, "--XX\r\nContent-Disposition: form-data; name=\"f%d\"\r\n\r\nx\r\n", i);
    buf_puts(&form, "--XX--\r\n");
    assert_int_equal(send_form(f, &form, &b), 400);
    assert_non_null(strstr(b.data, "more than 16 parts"));

    /* gone in the middle */
    wait_spooled(f, 0);
    form.len = 0;
    add_file(&form, "weights", DEMO_ADAPTER("whitman") "/adapter_model.safetensors");
    const int fd = dial(f);
    send_text(fd, "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; "
                  "boundary=XX\r\nContent-Length: 9000000\r\n\r\n");
    send_bytes(fd, form.data, form.len);
    wait_spooled(f, 1);
    close(fd);
    wait_spooled(f, 0);
    buf_free(&form);
    buf_free(&b);
}

static void uploads_over_the_limit_wait_their_turn(void **state)
{
    (void)state;
    struct fixture f;
    struct buf b;
    buf_init(&b, 1 << 20);
    start(&f, NULL, (struct http_opts){ .max_uploads = 1 });
    const int first = dial(&f), second = dial(&f);
    send_text(first, "PUT /v1/adapters/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345");
    wait_spooled(&f, 1);
    send_text(second, "PUT /v1/adapters/b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n12345");
    assert_int_equal(read_answer(second, &b), 429);
    assert_non_null(strstr(b.data, "Retry-After"));
    send_text(first, "12345");
    assert_int_equal(read_answer(first, &b), 400); /* no tar, but it had its turn */
    send_text(second, "PUT /v1/adapters/b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n12345");
    assert_int_equal(read_answer(second, &b), 400);
    close(first);
    close(second);
    stop(&f);
    buf_free(&b);
}

/* --- clients that leave ------------------------------------------------------------------------------------ */

static void a_client_that_leaves_a_stream_frees_its_sequences(void **state)
{
    struct fixture *f = *state;
    struct buf b;
    buf_init(&b, 16 << 20);
    const int fd = dial(f);
    send_post(fd, "/v1/completions", LONG ",\"stream\":true}");
    read_until(fd, "data: ", &b);
    assert_non_null(strstr(b.data, "text/event-stream"));
    struct sched_stats before, after;
    sched_stats(f->s->sched, &before);
    assert_true(before.running > 0);
    close(fd);
    assert_true(engine_idle(f));
    sched_stats(f->s->sched, &after);
    assert_true(after.cancelled > before.cancelled);
    buf_free(&b);
}

static void a_client_that_leaves_while_it_waits_frees_its_sequences(void **state)
{
    struct fixture *f = *state;
    for (int half = 0; half < 2; half++) { /* close, or close the sending side alone */
        struct sched_stats before, after;
        const int fd = dial(f);
        sched_stats(f->s->sched, &before);
        send_post(fd, "/v1/completions", LONG "}");
        wait_running(f);
        if (half)
            shutdown(fd, SHUT_WR);
        else
            close(fd);
        assert_true(engine_idle(f));
        sched_stats(f->s->sched, &after);
        assert_true(after.cancelled >= before.cancelled + 50);
        if (half)
            close(fd);
    }
}

static void whole_and_streamed_answers_of_many_clients_are_their_own(void **state)
{
    struct fixture *f = *state;
    enum { N = 16 };
    int fd[N];
    struct buf b[N], alone;
    buf_init(&alone, 1 << 20);
    const char *fields = "{\"prompt\":\"It was a dark night\",\"max_tokens\":60,\"temperature\":0,"
                         "\"ignore_eos\":true%s%s}";
    char body[300];
    for (int k = 0; k < 2; k++) {
        char want[2000];
        const char *model = k ? ",\"model\":\"shakespeare\"" : "";
        const int one = dial(f);
        snprintf(body, sizeof body, fields, model, "");
        assert_int_equal(ask(one, "/v1/completions", body, &alone), 200);
        close(one);
        const char *t = strstr(alone.data, "\"text\":\"") + 8;
        snprintf(want, sizeof want, "%.*s", (int)(strstr(t, "\",\"logprobs\"") - t), t);
        for (int i = 0; i < N; i++) {
            buf_init(&b[i], 1 << 20);
            fd[i] = dial(f);
            snprintf(body, sizeof body, fields, model, i % 2 ? ",\"stream\":true" : "");
            send_post(fd[i], "/v1/completions", body);
        }
        for (int i = 0; i < N; i++) {
            if (i % 2 == 0) {
                assert_int_equal(read_answer(fd[i], &b[i]), 200);
                assert_non_null(strstr(b[i].data, want));
            } else {
                read_until(fd[i], "[DONE]", &b[i]);
                char got[2000] = "";
                for (const char *p = b[i].data; (p = strstr(p, "\"text\":\"")) != NULL;) {
                    p += 8;
                    snprintf(got + strlen(got), sizeof got - strlen(got), "%.*s",
                             (int)(strstr(p, "\",\"logprobs\"") - p), p);
                }
                assert_string_equal(got, want);
            }
            close(fd[i]);
            buf_free(&b[i]);
        }
    }
    buf_free(&alone);
}

/* --- clients that dawdle -------------------------------------------------------------------------------------- */

static void slow_headers_and_slow_bodies_are_cut_off(void **state)
{
    (void)state;
    struct fixture f;
    struct buf b;
    buf_init(&b, 1 << 20);
    start(&f, NULL, (struct http_opts){ .header_seconds = 0.3, .body_seconds = 0.3, .idle_seconds = 0.3 });
    const int quiet = dial(&f), drip = dial(&f), body = dial(&f), idle = dial(&f);
    send_text(idle, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_int_equal(read_answer(idle, &b), 200);
    send_text(drip, "GET /health HTTP/1.1\r\nX-A: ");
    send_text(body, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{");
    int left = 3;
    bool ok_drip = true, ok_body = true;
    for (int i = 0; i < 400 && left > 0; i++) { /* a byte now and then keeps neither alive */
        usleep(20000);
        left = 1;
        if (ok_drip)
            ok_drip = send_text(drip, "a");
        if (ok_body)
            ok_body = send_text(body, " ");
        left = ok_drip + ok_body;
    }
    assert_int_equal(left, 0);
    b.len = 0;
    read_until(quiet, NULL, &b); /* returns when the server closes */
    assert_int_equal(b.len, 0);
    read_until(idle, NULL, &b);
    close(quiet);
    close(drip);
    close(body);
    close(idle);
    assert_true(alive(&f));
    stop(&f);
    buf_free(&b);
}

static void a_reader_that_stops_is_cut_off_and_its_sequences_freed(void **state)
{
    (void)state;
    struct fixture f;
    start(&f, NULL, (struct http_opts){ .stall_seconds = 0.5 });
    const int small = 4096, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    const struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)f.port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    assert_int_equal(connect(fd, (const struct sockaddr *)&a, sizeof a), 0);
    send_post(fd, "/v1/completions", LONG ",\"stream\":true,\"logprobs\":20}");
    wait_running(&f);
    struct http_stats st;
    for (int i = 0; i < PATIENCE_MS / 10; i++) { /* never reads */
        usleep(10000);
        http_stats(f.h, &st);
        if (st.connections == 0)
            break;
    }
    assert_int_equal(st.connections, 0);
    assert_true(engine_idle(&f));
    close(fd);
    stop(&f);
}

static void connections_over_the_limit_are_closed_and_the_rest_served(void **state)
{
    (void)state;
    struct fixture f;
    struct buf b;
    buf_init(&b, 1 << 20);
    start(&f, NULL, (struct http_opts){ .max_connections = 64, .max_per_address = 4 });
    int fd[8], served = 0;
    for (int i = 0; i < 8; i++) {
        fd[i] = dial(&f);
        send_text(fd[i], "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    for (int i = 0; i < 8; i++)
        served += read_answer(fd[i], &b) == 200;
    assert_int_equal(served, 4);
    for (int i = 0; i < 8; i++)
        close(fd[i]);
    usleep(50000);
    assert_true(alive(&f));
    stop(&f);
    buf_free(&b);
}

static void stopping_cuts_off_whatever_still_runs(void **state)
{
    (void)state;
    for (int k = 0; k < 3; k++) {
        struct fixture f;
        struct buf b;
        buf_init(&b, 16 << 20);
        start(&f, NULL, (struct http_opts){ 0 });
        const int stream = dial(&f), whole = dial(&f), body = dial(&f), idle = dial(&f);
        send_post(stream, "/v1/completions", LONG ",\"stream\":true}");
        if (k > 1) /* before the other takes all places: sequences are served in the order they come */
            read_until(stream, "data: ", &b);
        send_post(whole, "/v1/completions", LONG "}");
        send_text(body, "PUT /v1/adapters/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n123");
        if (k > 0)
            wait_running(&f);
        stop(&f);
        close(stream);
        close(whole);
        close(body);
        close(idle);
        buf_free(&b);
    }
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_request_may_come_byte_by_byte),
        cmocka_unit_test(a_chunked_body_is_a_body),
        cmocka_unit_test(a_body_over_the_limit_is_413_announced_or_not),
        cmocka_unit_test(a_client_that_expects_100_gets_the_refusal_instead),
        cmocka_unit_test(pipelined_requests_are_answered_in_order),
        cmocka_unit_test(a_wrong_method_leaves_the_connection_usable),
        cmocka_unit_test(floods_and_nonsense_do_not_stop_the_server),
        cmocka_unit_test(a_body_whose_end_is_not_clear_is_refused),
        cmocka_unit_test(a_nul_in_a_path_does_not_make_it_another),
        cmocka_unit_test(forms_are_taken_whole_or_not_at_all),
        cmocka_unit_test(uploads_over_the_limit_wait_their_turn),
        cmocka_unit_test(a_client_that_leaves_a_stream_frees_its_sequences),
        cmocka_unit_test(a_client_that_leaves_while_it_waits_frees_its_sequences),
        cmocka_unit_test(whole_and_streamed_answers_of_many_clients_are_their_own),
        cmocka_unit_test(slow_headers_and_slow_bodies_are_cut_off),
        cmocka_unit_test(a_reader_that_stops_is_cut_off_and_its_sequences_freed),
        cmocka_unit_test(connections_over_the_limit_are_closed_and_the_rest_served),
        cmocka_unit_test(stopping_cuts_off_whatever_still_runs),
    };
    return cmocka_run_group_tests_name("http", tests, setup, teardown);
}
