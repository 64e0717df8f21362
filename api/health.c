/* health.c - is the process alive, and should it get work? */
#include "api/api_int.h"

int health(struct api_ctx *c, struct err *err)
{
    return resp_json(c, 200, json_pack("{s:s, s:s}", "status", "ok", "version", c->api->o.version),
                     err);
}

int ready(struct api_ctx *c, struct err *err)
{
    if (atomic_load(&c->api->draining))
        return err_set(err, ERR_UNAVAILABLE, "this server is shutting down");
    return resp_json(c, 200, json_pack("{s:s}", "status", "ready"), err);
}
