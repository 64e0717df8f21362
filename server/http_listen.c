/* http_listen.c - the socket that the server listens on, and who can reach it. */
#include "server/http.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int http_listen(const char *host, int port, int *ret_fd, int *ret_port, bool *ret_loopback,
                struct err *err)
{
    struct addrinfo want = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV }, *list = NULL;
    char service[16];
    snprintf(service, sizeof service, "%d", port);
    const int r = getaddrinfo(host, service, &want, &list);
    if (r != 0)
        return err_set(err, ERR_INVALID, "--host %s: %s", host, gai_strerror(r));
    int fd = -1, why = 0;
    for (const struct addrinfo *a = list; a != NULL && fd < 0; a = a->ai_next) {
        const int one = 1;
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd >= 0)
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (fd < 0 || bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, 512) != 0) {
            why = errno;
            if (fd >= 0)
                close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0)
        return err_set(err, ERR_IO, "cannot listen on %s port %d: %s", host, port, strerror(why));

    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } at;
    socklen_t n = sizeof at;
    memset(&at, 0, sizeof at);
    getsockname(fd, &at.any, &n);
    if (at.any.sa_family == AF_INET6) {
        *ret_loopback = IN6_IS_ADDR_LOOPBACK(&at.v6.sin6_addr);
        *ret_port = ntohs(at.v6.sin6_port);
    } else {
        *ret_loopback = ntohl(at.v4.sin_addr.s_addr) >> 24 == 127;
        *ret_port = ntohs(at.v4.sin_port);
    }
    *ret_fd = fd;
    return ERR_OK;
}
