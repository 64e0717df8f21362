/* web.h - the files of web/, compiled in by tools/embed.sh; the last entry has path NULL. */
#ifndef API_WEB_H
#define API_WEB_H

#include <stddef.h>

struct web_file {
    const char *path; /* "index.html" */
    const char *type; /* content type */
    const unsigned char *data;
    size_t len;
};
extern const struct web_file web_files[];

#endif
