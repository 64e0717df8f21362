/* adapter_chart.c - where in the model an adapter acts: two small charts side by side, a column per
 * module and a row per layer, the height of a bar for the rank and for the norm of the change. */
#include "server/cmd_adapter.h"

#include <stdio.h>
#include <string.h>

/* Eighths of a character's height; 0 is drawn as a dot, a module that is not adapted as nothing. */
static const char *bar(double value, double max)
{
    static const char *const bars[] = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" };
    if (!(value > 0) || !(max > 0))
        return "·";
    int i = (int)(value / max * 8.0 - 1e-9);
    return bars[i < 0 ? 0 : i > 7 ? 7 : i];
}

/* The last word of a path: "q_proj". */
static const char *last_word(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot != NULL ? dot + 1 : path;
}

/* Which modules occur, in order, and the first path of each. */
struct columns {
    int n, module[MOD_SLOTS];
    const char *name[MOD_SLOTS];
};

static struct columns columns_of(const struct adapter_src *a)
{
    struct columns c = { 0 };
    for (int m = 0; m < MOD_SLOTS; m++)
        for (size_t i = 0; i < a->nmodules; i++)
            if ((int)a->modules[i].module == m) {
                c.module[c.n] = m;
                c.name[c.n++] = last_word(a->modules[i].path);
                break;
            }
    return c;
}

static void print_heading(const struct columns *c, const char *title)
{
    int width = 0;
    for (int i = 0; i < c->n; i++)
        width += (int)strlen(c->name[i]) + 1;
    printf("   %-*.*s", width, width, title);
}

static void print_names(const struct columns *c)
{
    printf("   ");
    for (int i = 0; i < c->n; i++)
        printf("%s ", c->name[i]);
}

/* One layer; `norm` NULL: ranks. */
static void print_row(const struct adapter_src *a, const struct columns *c, int layer,
                      const double *norm, double max)
{
    printf("   ");
    for (int k = 0; k < c->n; k++) {
        const char *mark = " ";
        for (size_t i = 0; i < a->nmodules; i++)
            if (a->modules[i].layer == layer && (int)a->modules[i].module == c->module[k])
                mark = bar(norm != NULL ? norm[i] : a->modules[i].rank, max);
        printf("%s%*s", mark, (int)strlen(c->name[k]), "");
    }
}

void adapter_chart(const struct adapter_src *a, const double *norm)
{
    const struct columns c = columns_of(a);
    double rank_max = 0, norm_max = 0;
    char title[64];
    int layers = 0;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        rank_max = m->rank > rank_max ? m->rank : rank_max;
        norm_max = norm != NULL && norm[i] > norm_max ? norm[i] : norm_max;
        layers = m->layer >= layers ? m->layer + 1 : layers;
    }
    snprintf(title, sizeof title, "rank, full bar %g", rank_max);
    printf("%5s", "");
    print_heading(&c, title);
    snprintf(title, sizeof title, "norm, full bar %.3g", norm_max);
    if (norm != NULL)
        print_heading(&c, title);
    printf("\nlayer");
    print_names(&c);
    if (norm != NULL)
        print_names(&c);
    for (int l = 0; l < layers; l++) {
        printf("\n%5d", l);
        print_row(a, &c, l, NULL, rank_max);
        if (norm != NULL)
            print_row(a, &c, l, norm, norm_max);
    }
    printf("\n\n");
}
