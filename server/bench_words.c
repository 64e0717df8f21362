/* bench_words.c - a tokenizer for bases of random numbers. */
#include "server/bench_stage.h"

#include <jansson.h>
#include <stdio.h>

enum { BYTES = 256 };

/* The character that stands for a byte in byte-level vocabularies: printable ones for themselves, the
 * others, in order, for those from 256 on. */
static void byte_char(int byte, int *others, char ret[5])
{
    const bool self = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    const int c = self ? byte : BYTES + (*others)++;
    if (c < 0x80)
        snprintf(ret, 5, "%c", c);
    else
        snprintf(ret, 5, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 0x3f));
}

static json_t *vocabulary(int V)
{
    json_t *vocab = json_object();
    char text[16];
    int others = 0;
    for (int i = 0; i < V; i++) {
        if (i < BYTES)
            byte_char(i, &others, text);
        else
            snprintf(text, sizeof text, "w%x", (unsigned)i);
        if (json_object_set_new(vocab, text, json_integer(i)) != 0) {
            json_decref(vocab);
            return NULL;
        }
    }
    return vocab;
}

char *stage_tokenizer(int V)
{
    json_t *level = json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                              "trim_offsets", 1, "use_regex", 1);
    json_t *model = json_pack("{s:s, s:o, s:[]}", "type", "BPE", "vocab", vocabulary(V), "merges");
    json_t *all = json_pack("{s:s, s:[], s:n, s:O, s:n, s:o, s:o}", "version", "1.0", "added_tokens",
                            "normalizer", "pre_tokenizer", level, "post_processor", "decoder", level,
                            "model", model);
    char *text = all != NULL ? json_dumps(all, JSON_COMPACT) : NULL;
    json_decref(all);
    return text;
}
