/* verify.c - the content hash of an adapter, by a thread that follows the one that reads it.
 *
 * SHA-256 takes twice as long as reading (25 MB from the page cache: 16 ms and 7 ms on the reference
 * machine), and who waits for a cold adapter waits for both.  The reader says how far it is; the
 * thread hashes what is there.
 *
 * An adapter that was evicted from the cache is read again and again, and hashing it is half of the CPU
 * time of that, which running sequences lack.  So a connection that builds adapters keeps a sum of 128 bits
 * of what had the right hash, and what has the same sum the next time is the same.  What has another is
 * hashed again: the hash alone decides that something is damaged.  The sums are taken from memory of this
 * process, so they say nothing about files that others wrote.  There is a slot for each of VERIFIED_SLOTS
 * version ids in a row; versions that share one take it from each other. */
#include "store/store_int.h"

#include <stdlib.h>
#include <string.h>

enum { WORTH_A_THREAD = 2 << 20 }; /* bytes of tensors */
enum { VERIFIED_SLOTS = 1 << 14 };

struct verified {
    int64_t version_id; /* 0: nothing */
    uint8_t sum[16];
};

struct verified *verify_slot(struct store *st, int64_t version_id)
{
    if (st->verified == NULL)
        st->verified = calloc(VERIFIED_SLOTS, sizeof *st->verified);
    return st->verified != NULL ? &st->verified[(uint64_t)version_id % VERIFIED_SLOTS] : NULL;
}

static bool is_known(const struct verify *v)
{
    return v->slot != NULL && v->slot->version_id == v->version_id;
}

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
    v->src = src;
    v->ready = 0;
    v->given_up = false;
    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->more, NULL);
    v->started = !is_known(v) && src->bytes >= WORTH_A_THREAD &&
                 pthread_create(&v->thread, NULL, verify_main, v) == 0;
    if (v->started)
        pthread_setname_np(v->thread, "lorad-verify");
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

/* Of the tensors, and of the hash that they should have. */
static bool sum_of(const struct adapter_src *src, uint8_t ret[16])
{
    if (!adapter_src_sum(src, ret))
        return false;
    for (int i = 0; i < 16; i++)
        ret[i] ^= src->hash[i];
    return true;
}

/* All tensors are there. */
static bool is_right(struct verify *v)
{
    uint8_t sum[16] = { 0 };
    const bool has_sum = v->slot != NULL && sum_of(v->src, sum); /* while the thread still hashes */
    if (has_sum && is_known(v) && memcmp(sum, v->slot->sum, sizeof sum) == 0)
        return true;
    if (v->started)
        pthread_join(v->thread, NULL);
    else
        adapter_src_hash(v->src, v->hash);
    v->started = false;
    if (memcmp(v->hash, v->src->hash, sizeof v->hash) != 0)
        return false;
    if (has_sum) {
        v->slot->version_id = v->version_id;
        memcpy(v->slot->sum, sum, sizeof sum);
    }
    return true;
}

bool verify_end(struct verify *v, bool all)
{
    if (v->src == NULL)
        return false;
    if (v->started)
        tell(v, SIZE_MAX, !all);
    const bool right = all && is_right(v);
    if (v->started)
        pthread_join(v->thread, NULL);
    pthread_cond_destroy(&v->more);
    pthread_mutex_destroy(&v->lock);
    return right;
}
