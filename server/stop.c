/* stop.c - see stop.h. */
#include "server/stop.h"

#include <signal.h>

static volatile sig_atomic_t stopped;

static void stop(int sig)
{
    (void)sig;
    stopped = 1;
}

void stop_catch(void)
{
    struct sigaction sa = { .sa_handler = stop, .sa_flags = (int)SA_RESETHAND };
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
}

bool stop_asked(void) { return stopped != 0; }
