/* cmd_train_show.c - what a run shows: a bar on a terminal, lines in a pipe, JSON. */
#include "server/cmd_train.h"

#include "engine/util.h"
#include "server/train_args.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BAR = 24, LINES = 20 };

void train_show_init(struct train_show *s, const struct opts *o, int64_t step, int64_t steps)
{
    *s = (struct train_show){
        .json = opt_flag(o, "json"), .tty = isatty(STDERR_FILENO), .began = now_mono(),
        .first = step, .step = step, .every = (steps + LINES - 1) / LINES,
    };
}

static void left_text(struct train_show *s, const struct train_report *r, char ret[32])
{
    const int64_t done = r->step - s->first;
    const double each = done > 0 ? (now_mono() - s->began) / (double)done : 0;
    train_args_time(each * (double)(r->steps - r->step), ret);
}

static void one_line(struct train_show *s, const struct train_report *r,
                     const struct train_valid *v, char *line, size_t cap)
{
    char left[32], valid[48] = "", kept[48] = "";
    left_text(s, r, left);
    if (v != NULL)
        snprintf(valid, sizeof valid, "  validation %.4f", v->loss);
    if (r->budget >= 0)
        snprintf(kept, sizeof kept, "  triplets %lld", (long long)r->kept);
    snprintf(line, cap, "step %lld/%lld  loss %.4f%s  lr %.2e%s  %.0f tokens/s  %s left",
             (long long)r->step, (long long)r->steps, r->loss, valid, r->lr, kept,
             r->seconds > 0 ? (double)r->tokens / r->seconds : 0.0, left);
}

static int columns(void)
{
    struct winsize w;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0 ? w.ws_col : 80;
}

/* Numbers first: what does not fit on the line is the bar. */
static void bar(struct train_show *s, const struct train_report *r, const struct train_valid *v)
{
    char line[200], whole[240], full[BAR + 1];
    const int n = (int)(r->step * BAR / r->steps);
    memset(full, '.', BAR);
    memset(full, '#', (size_t)n);
    full[BAR] = '\0';
    one_line(s, r, v, line, sizeof line);
    snprintf(whole, sizeof whole, "%s  [%s]", line, full);
    fprintf(stderr, "\r%.*s\033[K", columns() - 1, whole);
    s->open = v == NULL; /* else it stays to be read */
    if (!s->open)
        fputc('\n', stderr);
    fflush(stderr);
}

void train_show_step(struct train_show *s, const struct train_report *r,
                     const struct train_valid *v, const json_t *line)
{
    char text[200];
    s->step = r->step;
    if (s->json) {
        json_dumpf(line, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
        putchar('\n');
        fflush(stdout);
    } else if (s->tty) {
        bar(s, r, v);
    } else if (r->step % s->every == 0 || r->step == 1 || r->step == r->steps || v != NULL) {
        one_line(s, r, v, text, sizeof text);
        fprintf(stderr, "%s\n", text);
    }
}

void train_show_end(const struct train_show *s)
{
    if (s->open)
        fputc('\n', stderr);
}

size_t train_show_peak(void)
{
    FILE *f = fopen("/proc/self/status", "r");
    char line[256];
    unsigned long long kib = 0;
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "VmHWM: %llu kB", &kib) == 1)
            break;
    if (f != NULL)
        fclose(f);
    return (size_t)kib * 1024;
}
