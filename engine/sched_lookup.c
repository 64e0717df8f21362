/* sched_lookup.c - prompt-lookup decoding: guess what comes next from what was there before, and
 * check all guesses in one pass.
 *
 * The pass over one row of a sequence reads every weight for one token; over a few rows it takes
 * little longer.  So, when a single greedy sequence runs, the tokens that followed the last
 * occurrence of its last three (or two) tokens are guessed to follow again (prompt-lookup decoding:
 * A. Saxena, 2023), and go through the pass as rows of the same sequence.  The choices of all rows
 * are made as always, each under the assumption that the guesses before it were right; they are
 * taken in order until one differs from what was guessed, and what was computed on top of a wrong
 * guess is never committed (take_jobs() in sched.c).  A row's result does not depend on the rows
 * beside it, so tokens and log-probabilities are those of decoding one by one, to the bit.
 *
 * How much is guessed follows success: twice as much after all of it was right, one more than what
 * was right otherwise, so that text which does not repeat costs one row more at most.  After
 * MISSES passes without any success nothing is guessed for as many steps, REST at most. */
#include "engine/sched_int.h"

enum { GRAM_MAX = 3, GRAM_MIN = 2, FIRST = 4, MISSES = 2, REST = 32 };

/* Where the last occurrence of the last `gram` of tokens[0..n) before themselves ends, or -1. */
static int find_gram(const int32_t *tokens, int n, int gram)
{
    if (n <= gram)
        return -1;
    const int32_t *last = tokens + n - gram;
    for (int end = n - 1; end >= gram; end--) {
        int i = 0;
        while (i < gram && tokens[end - gram + i] == last[i])
            i++;
        if (i == gram)
            return end;
    }
    return -1;
}

/* Writes guesses to tokens[n .. n + most); returns how many.  A text that repeats a period shorter
 * than that is continued with guesses that were just made. */
static int guess(int32_t *tokens, int n, int most)
{
    int from = -1;
    for (int gram = GRAM_MAX; gram >= GRAM_MIN && from < 0; gram--)
        from = find_gram(tokens, n, gram);
    for (int i = 0; from >= 0 && i < most; i++)
        tokens[n + i] = tokens[from + i];
    return from >= 0 ? most : 0;
}

static int least(int a, int b) { return a < b ? a : b; }

void lookup_plan(struct sched *s)
{
    struct gen *g = s->running.first;
    if (s->lookup == 0 || s->running.n != 1 || g->sample.temperature != 0 || g->rows != 1 ||
        g->nlogits != 1 || g->ntokens - g->kv.len != 1 || (g->echo && g->echoed < g->nprompt))
        return;
    if (g->lookup_rest > 0) {
        g->lookup_rest--;
        return;
    }
    /* The choice of the last row is a token too. */
    int most = least(g->lookup_most > 0 ? g->lookup_most : FIRST, s->lookup);
    most = least(most, g->nprompt + g->max_tokens - g->ntokens - 1);
    most = least(most, least(s->max_rows, s->max_logits) - 1);
    if (!kv_reserve(s->kv, &g->kv, g->ntokens + most))
        most = least(most, g->kv.npages * KV_PAGE - g->ntokens);
    if (most < 1)
        return;
    g->guessed = guess(g->tokens, g->ntokens, most);
    g->rows = g->nlogits = 1 + g->guessed;
}

void lookup_learn(struct sched *s, struct gen *g, int right)
{
    if (g->guessed == 0)
        return;
    atomic_fetch_add(&s->guessed, (uint64_t)g->guessed);
    atomic_fetch_add(&s->guessed_right, (uint64_t)right);
    g->lookup_most = right == g->guessed ? 2 * g->guessed : right + 1;
    g->lookup_misses = right > 0 ? 0 : g->lookup_misses + 1;
    if (g->lookup_misses >= MISSES)
        g->lookup_rest = least(g->lookup_misses, REST);
}
