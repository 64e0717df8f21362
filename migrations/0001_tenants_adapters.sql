-- Tenants, their keys, adapters, versions of adapters, tensors, and who changed what.
--
-- Never edit this file once it has been released: add a new one.
--
-- Every table has tenant_id, and where a row belongs to a row of another table, the pair
-- (tenant_id, id) is the foreign key: nothing of one tenant can hang on something of another.
-- Times are milliseconds since 1970 (UTC).  Hashes are 32 bytes; the views show them as hex.

PRAGMA application_id = 0x4c4f5241; -- "LORA"

-- AUTOINCREMENT: the audit table goes on naming tenants, keys and versions that are gone, so
-- their ids are never given to anything else.
CREATE TABLE tenant (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT    NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 64),
    created_ms INTEGER NOT NULL
) STRICT;

INSERT INTO tenant (id, name, created_ms)
VALUES (1, 'default', CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER));

-- The key itself is nowhere: `hash` is HMAC-SHA-256 of it with the pepper, a secret file beside
-- the database.  `pepper` tells which pepper that was (8 bytes that say nothing about it).
CREATE TABLE access_key (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id    INTEGER NOT NULL REFERENCES tenant (id) ON DELETE CASCADE,
    hash         BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32),
    pepper       BLOB    NOT NULL CHECK (length(pepper) = 8),
    prefix       TEXT    NOT NULL,             -- first 12 characters, to recognise it by
    label        TEXT    NOT NULL DEFAULT '',
    created_ms   INTEGER NOT NULL,
    last_used_ms INTEGER NOT NULL DEFAULT 0,   -- 0: never; written at most once a minute
    revoked_ms   INTEGER NOT NULL DEFAULT 0    -- 0: good
) STRICT;
CREATE INDEX access_key_tenant ON access_key (tenant_id);

-- A name inside a tenant.  `live` is the number of the version that answers to the bare name:
-- the last foreign key says that it is one of this adapter's, and so keeps it from being deleted.
CREATE TABLE adapter (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id  INTEGER NOT NULL REFERENCES tenant (id),
    name       TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    live       INTEGER,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant_id, name),
    UNIQUE (tenant_id, id),
    FOREIGN KEY (id, live) REFERENCES version (adapter_id, number) DEFERRABLE INITIALLY DEFERRED
) STRICT;

-- The next version number of every name that was ever used.  It outlives the adapter, so that
-- `support@3` never means two things.
CREATE TABLE adapter_number (
    tenant_id INTEGER NOT NULL REFERENCES tenant (id) ON DELETE CASCADE,
    name      TEXT    NOT NULL,
    next      INTEGER NOT NULL CHECK (next > 1),
    PRIMARY KEY (tenant_id, name)
) STRICT, WITHOUT ROWID;

-- One immutable version.  `hash` covers the tensors and what changes the result (adapter.h says
-- how); `base_hash` is the base it is bound to, `base_claimed` that only the uploader says so.
CREATE TABLE version (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id    INTEGER NOT NULL,
    adapter_id   INTEGER NOT NULL,
    number       INTEGER NOT NULL CHECK (number > 0),
    method       TEXT    NOT NULL,             -- 'lora', 'rslora', 'adalora'
    rank_min     INTEGER NOT NULL,
    rank_max     INTEGER NOT NULL,
    alpha        REAL    NOT NULL,             -- lora_alpha of the config
    params       INTEGER NOT NULL,             -- numbers in all tensors
    bytes        INTEGER NOT NULL,             -- of all tensors
    modules      INTEGER NOT NULL,
    hash         BLOB    NOT NULL CHECK (length(hash) = 32),
    base_hash    BLOB    NOT NULL CHECK (length(base_hash) = 32),
    base_claimed INTEGER NOT NULL CHECK (base_claimed IN (0, 1)),
    base_name    TEXT,                         -- base_model_name_or_path of the config
    config       TEXT    NOT NULL,             -- adapter_config.json as it came
    origin       TEXT    NOT NULL CHECK (length(origin) BETWEEN 1 AND 15), -- 'upload', 'train'
    parent_id    INTEGER REFERENCES version (id) ON DELETE SET NULL, -- trained on from this one
    -- AdaLoRA's schedule, NULL for other methods
    init_r INTEGER, target_r INTEGER, tinit INTEGER, tfinal INTEGER, delta_t INTEGER,
    total_step INTEGER, beta1 REAL, beta2 REAL, orth_reg_weight REAL,
    -- measured quality, mean negative log-likelihood per token; NULL: not measured
    train_loss REAL, eval_loss REAL, eval_loss_base REAL, eval_tokens INTEGER,
    created_ms   INTEGER NOT NULL,
    UNIQUE (adapter_id, number),
    UNIQUE (adapter_id, hash, base_hash),
    UNIQUE (tenant_id, id),
    FOREIGN KEY (tenant_id, adapter_id) REFERENCES adapter (tenant_id, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX version_adapter ON version (tenant_id, adapter_id);
CREATE INDEX version_parent ON version (parent_id);

-- One adapted linear layer of a version.  `seq` counts from 0 in order of (layer, module).
-- `mask` has init_rank characters, '1' for each AdaLoRA triplet that was kept.
CREATE TABLE module (
    tenant_id  INTEGER NOT NULL,
    version_id INTEGER NOT NULL,
    seq        INTEGER NOT NULL CHECK (seq >= 0),
    layer      INTEGER NOT NULL CHECK (layer >= 0),
    module     TEXT    NOT NULL,  -- 'q', 'k', 'v', 'o', 'gate', 'up', 'down'
    path       TEXT    NOT NULL,  -- 'model.layers.0.self_attn.q_proj'
    rank       INTEGER NOT NULL CHECK (rank >= 0),
    init_rank  INTEGER NOT NULL CHECK (init_rank >= rank),
    alpha      REAL    NOT NULL,
    scaling    REAL    NOT NULL,
    inputs     INTEGER NOT NULL CHECK (inputs > 0),
    outputs    INTEGER NOT NULL CHECK (outputs > 0),
    dtype      TEXT    NOT NULL,  -- 'F32', 'F16', 'BF16'
    mask       TEXT    CHECK (mask IS NULL OR length(mask) = init_rank),
    PRIMARY KEY (version_id, seq),
    UNIQUE (version_id, layer, module),
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- Tensors, little-endian and row by row as in the safetensors file, cut into chunks of at most
-- 4 MiB: A is rank x inputs, B is outputs x rank, E (AdaLoRA) is rank numbers.  A module that was
-- pruned to rank 0 has none.
CREATE TABLE tensor_chunk (
    id         INTEGER PRIMARY KEY,
    tenant_id  INTEGER NOT NULL,
    version_id INTEGER NOT NULL,
    seq        INTEGER NOT NULL,
    part       TEXT    NOT NULL CHECK (part IN ('A', 'B', 'E')),
    chunk      INTEGER NOT NULL CHECK (chunk >= 0),
    data       BLOB    NOT NULL CHECK (length(data) BETWEEN 1 AND 4194304),
    UNIQUE (version_id, seq, part, chunk),
    FOREIGN KEY (version_id, seq) REFERENCES module (version_id, seq) ON DELETE CASCADE,
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT;

-- Who did what, written in the transaction that did it.  No foreign keys: it remembers what is
-- gone.  key_id NULL: the command line, or a server without keys.
CREATE TABLE audit (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id INTEGER NOT NULL,
    at_ms     INTEGER NOT NULL,
    key_id    INTEGER,
    action    TEXT    NOT NULL,  -- 'adapter.put', 'key.revoke', ...
    object    TEXT    NOT NULL   -- 'support@3', 'acme', 'key 7'
) STRICT;
CREATE INDEX audit_tenant ON audit (tenant_id, id);

-- For reading with the sqlite3 shell (docs/database.md); the program does not use them.

CREATE VIEW v_adapter AS
SELECT t.name AS tenant, a.name AS adapter, a.live,
       max(v.number) AS newest, count(v.id) AS versions, sum(v.bytes) AS bytes,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.created_ms / 1000, 'unixepoch') AS created
FROM adapter a JOIN tenant t ON t.id = a.tenant_id LEFT JOIN version v ON v.adapter_id = a.id
GROUP BY a.id;

CREATE VIEW v_version AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       v.method, v.rank_min, v.rank_max, v.alpha, v.modules, v.params, v.bytes,
       (SELECT sum(m.init_rank) FROM module m WHERE m.version_id = v.id) AS rank_before,
       (SELECT sum(m.rank) FROM module m WHERE m.version_id = v.id) AS rank_after,
       lower(hex(v.hash)) AS hash, lower(hex(v.base_hash)) AS base_hash, v.base_claimed,
       v.base_name, v.origin,
       (SELECT pa.name || '@' || p.number FROM version p JOIN adapter pa ON pa.id = p.adapter_id
        WHERE p.id = v.parent_id) AS parent,
       v.init_r, v.target_r, v.tinit, v.tfinal, v.delta_t, v.total_step,
       v.train_loss, v.eval_loss, v.eval_loss_base, v.eval_tokens,
       strftime('%Y-%m-%dT%H:%M:%SZ', v.created_ms / 1000, 'unixepoch') AS created
FROM version v JOIN adapter a ON a.id = v.adapter_id JOIN tenant t ON t.id = v.tenant_id;

CREATE VIEW v_module AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       m.layer, m.module, m.path, m.rank, m.init_rank, m.alpha, m.scaling, m.inputs, m.outputs,
       m.dtype, m.mask,
       (SELECT sum(length(c.data)) FROM tensor_chunk c
        WHERE c.version_id = m.version_id AND c.seq = m.seq) AS bytes
FROM module m JOIN version v ON v.id = m.version_id JOIN adapter a ON a.id = v.adapter_id
     JOIN tenant t ON t.id = v.tenant_id;

CREATE VIEW v_key AS
SELECT k.id, t.name AS tenant, k.prefix, k.label, k.revoked_ms > 0 AS revoked,
       strftime('%Y-%m-%dT%H:%M:%SZ', k.created_ms / 1000, 'unixepoch') AS created,
       strftime('%Y-%m-%dT%H:%M:%SZ', nullif(k.last_used_ms, 0) / 1000, 'unixepoch') AS last_used
FROM access_key k JOIN tenant t ON t.id = k.tenant_id;

CREATE VIEW v_audit AS
SELECT u.id, strftime('%Y-%m-%dT%H:%M:%SZ', u.at_ms / 1000, 'unixepoch') AS at,
       coalesce(t.name, 'tenant ' || u.tenant_id) AS tenant, u.key_id, u.action, u.object
FROM audit u LEFT JOIN tenant t ON t.id = u.tenant_id;
