/* peft_tokens.c - trainable_token_indices: rows of the embedding, and of the head, that an adapter
 * replaces.
 *
 * A list names rows of the embedding.  Where the head is the embedding, the same rows of the head
 * follow.  An object has a list for each module that it names by the end of its path; with a tied
 * head, two equal lists are one (and one tensor in the file), two that differ stand for themselves.
 * The tensor is <module>.token_adapter.trainable_tokens_delta [ids, D]; despite its name it holds the
 * new rows, not their differences.
 *
 * Refused, because PEFT itself cannot compute it or computes something that depends on the order of
 * the ids: rows of a module that LoRA or modules_to_save changes too, ids that are named twice. */
#include "engine/peft_int.h"

#include <stdlib.h>
#include <string.h>

static const char field[] = "trainable_token_indices";

/* As PEFT finds the module: by the end of its path; here whole components of it only. */
static bool names_module(const char *path, const char *key)
{
    const size_t n = strlen(path), k = strlen(key);
    return k > 0 && k <= n && strcmp(path + n - k, key) == 0 && (k == n || path[n - k - 1] == '.');
}

static int by_value(const void *a, const void *b)
{
    const json_int_t x = *(const json_int_t *)a, y = *(const json_int_t *)b;
    return (x > y) - (x < y);
}

/* Ids of the vocabulary, none of them twice. */
static int check_ids(const struct peft_reading *r, const json_t *ids)
{
    const size_t n = json_array_size(ids);
    json_int_t *all = malloc((n + 1) * sizeof *all);
    if (all == NULL)
        return err_nomem(r->err);
    int rc = n > 0 ? ERR_OK
                   : peft_refuse(r->err, "adapter_config.json: %s has a list without any ids", field);
    for (size_t i = 0; i < n && rc == ERR_OK; i++) {
        char shown[128];
        const json_t *id = json_array_get(ids, i);
        all[i] = json_integer_value(id);
        if (!json_is_integer(id) || all[i] < 0 || all[i] >= r->arch->V)
            rc = peft_refuse(r->err, "adapter_config.json: %s has %s among its ids: this base's "
                             "vocabulary has 0 to %d", field, peft_show_json(id, shown),
                             r->arch->V - 1);
    }
    if (rc == ERR_OK)
        qsort(all, n, sizeof *all, by_value);
    for (size_t i = 1; i < n && rc == ERR_OK; i++)
        if (all[i] == all[i - 1])
            rc = peft_refuse(r->err, "adapter_config.json: %s names the id %lld twice", field,
                             (long long)all[i]);
    free(all);
    return rc;
}

/* Two lists, or one of them NULL. */
static int find_lists(const struct peft_reading *r, const json_t **ret_embed, const json_t **ret_head)
{
    const char *key;
    char shown[128];
    json_t *v;
    if (json_is_array(r->c.tokens)) {
        *ret_embed = r->c.tokens;
        return ERR_OK;
    }
    json_object_foreach(r->c.tokens, key, v)
    {
        const bool embed = names_module(r->family->embed, key);
        const json_t **slot = embed ? ret_embed : ret_head;
        if (!embed && !names_module(r->family->head, key))
            return peft_refuse(r->err,
                               "adapter_config.json: %s names %s: this base (%s) has rows of the "
                               "embedding (%s) and the head (%s)", field, peft_show(key, shown),
                               r->arch->family, r->family->embed, r->family->head);
        if (!json_is_array(v))
            return peft_refuse(r->err, "adapter_config.json: %s must have lists of ids, not %s",
                               field, peft_show_json(v, shown));
        if (*slot != NULL)
            return peft_refuse(r->err, "adapter_config.json: %s names %s twice", field,
                               embed ? r->family->embed : r->family->head);
        *slot = v;
    }
    return ERR_OK;
}

/* Does something else change the table? */
static int check_free(const struct peft_reading *r, int module, const char *path)
{
    const bool saved = peft_is_saved(r, path);
    if (!saved && !peft_slot_of(r, 0, module)->targeted)
        return ERR_OK;
    return peft_refuse(r->err,
                       "adapter_config.json: %s replaces rows of %s, which %s changes too: PEFT does "
                       "not compute that", field, path, saved ? "modules_to_save" : "target_modules");
}

static int want_rows(struct peft_reading *r, enum adapter_extra kind, const json_t *ids,
                     const char *path)
{
    int rc = check_ids(r, ids);
    return rc != ERR_OK ? rc
                        : peft_want(r, kind, ids, (int)json_array_size(ids), r->arch->D, path,
                                    ".token_adapter.trainable_tokens_delta");
}

int peft_tokens_want(struct peft_reading *r)
{
    const json_t *embed = NULL, *head = NULL;
    if (r->c.tokens == NULL)
        return ERR_OK;
    int rc = find_lists(r, &embed, &head);
    if (rc == ERR_OK && r->arch->tied && embed != NULL && head != NULL) {
        if (json_equal(embed, head))
            head = NULL;
        else if (r->c.tie)
            rc = peft_refuse(r->err, "adapter_config.json: ensure_weight_tying is true, but %s has "
                             "other ids for the head than for the embedding", field);
    }
    const bool both = head == NULL && r->arch->tied;
    if (rc == ERR_OK && embed != NULL)
        rc = check_free(r, MOD_EMBED, r->family->embed);
    if (rc == ERR_OK && (head != NULL || both))
        rc = check_free(r, MOD_HEAD, r->family->head);
    if (rc == ERR_OK && embed != NULL)
        rc = want_rows(r, EXTRA_EMBED_ROWS, embed, r->family->embed);
    if (rc == ERR_OK && head != NULL)
        rc = want_rows(r, EXTRA_HEAD_ROWS, head, r->family->head);
    return rc;
}
