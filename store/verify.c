/* verify.c - the content hash of an adapter, by a thread that follows the one that reads it.
 *
 * SHA-256 takes twice as long as reading (25 MB from the page cache: 16 ms and 7 ms on the reference
 * machine), and who waits for a cold adapter waits for both.  The reader says how far it is; the
 * thread hashes what is there. */
#include "store/store_int.h"

#include <string.h>

enum { WORTH_A_THREAD = 2 << 20 }; /* bytes of tensors */

/* Until the tensors of module i (i = nmodules: the extra tensors) are there; false: they never will. */
static bool wait_for(void *ud, size_t i)
{
    struct verify *v = ud;
    pthread_mutex_lock(&v->lock);
    while (v->ready <= i && !v->given_up)
        pthread_cond_wait(&v->more, &v->lock);
    const bool go_on = !v->given_up;
    pthread_mutex_unlock(&v->lock);
    return go_on;
}

static void *verify_main(void *ud)
{
    struct verify *v = ud;
    adapter_src_hash_following(v->src, wait_for, v, v->hash);
    return NULL;
}

void verify_begin(struct verify *v, const struct adapter_src *src)
{
    memset(v, 0, sizeof *v);
    v->src = src;
    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->more, NULL);
    v->started = src->bytes >= WORTH_A_THREAD &&
                 pthread_create(&v->thread, NULL, verify_main, v) == 0;
}

static void tell(struct verify *v, size_t ready, bool given_up)
{
    pthread_mutex_lock(&v->lock);
    v->ready = ready;
    v->given_up = given_up;
    pthread_cond_signal(&v->more);
    pthread_mutex_unlock(&v->lock);
}

void verify_ready(struct verify *v, size_t ready) { tell(v, ready, false); }

bool verify_end(struct verify *v, bool all)
{
    if (v->src == NULL)
        return false;
    if (v->started) {
        tell(v, SIZE_MAX, !all);
        pthread_join(v->thread, NULL);
    } else if (all) {
        adapter_src_hash(v->src, v->hash);
    }
    pthread_cond_destroy(&v->more);
    pthread_mutex_destroy(&v->lock);
    return all && memcmp(v->hash, v->src->hash, sizeof v->hash) == 0;
}
