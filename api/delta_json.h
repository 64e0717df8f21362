/* delta_json.h - how two adapters are compared, as the API and the command line both say it. */
#ifndef API_DELTA_JSON_H
#define API_DELTA_JSON_H

#include "engine/delta.h"

#include <jansson.h>

/* A new reference with `rank`, `norm` (pairs), `diff`, `cosine` of all modules and of each;
 * NULL when memory is out. */
json_t *delta_json(const struct delta *d);

#endif
