-- Files, fine-tuning jobs, and what a run leaves: events, metrics, ranks, state, checkpoints.
--
-- Never edit this file once it has been released: add a new one.

-- Uploaded data.  It is 'pending' while its chunks are being written, and nobody's then.
CREATE TABLE file (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id  INTEGER NOT NULL REFERENCES tenant (id),
    ref        TEXT    NOT NULL UNIQUE CHECK (ref GLOB 'file-*' AND length(ref) <= 31),
    name       TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 255),
    purpose    TEXT    NOT NULL,             -- 'fine-tune', 'evals'
    status     TEXT    NOT NULL CHECK (status IN ('pending', 'processed')),
    bytes      INTEGER NOT NULL CHECK (bytes >= 0),
    hash       BLOB    NOT NULL CHECK (length(hash) = 32), -- sha256 of the content
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,                      -- NULL: never
    UNIQUE (tenant_id, id)
) STRICT;
CREATE INDEX file_expires ON file (expires_ms) WHERE expires_ms IS NOT NULL;
CREATE INDEX file_pending ON file (created_ms) WHERE status = 'pending';

CREATE TABLE file_chunk (
    id        INTEGER PRIMARY KEY,
    tenant_id INTEGER NOT NULL,
    file_id   INTEGER NOT NULL,
    chunk     INTEGER NOT NULL CHECK (chunk >= 0),
    data      BLOB    NOT NULL CHECK (length(data) BETWEEN 1 AND 4194304),
    UNIQUE (file_id, chunk),
    FOREIGN KEY (tenant_id, file_id) REFERENCES file (tenant_id, id) ON DELETE CASCADE
) STRICT;

-- One fine-tuning job.  Files are named, not referred to: they may go when the job has ended.
-- `claim` is the number of the runner's claim on it; what is written under another one is refused.
-- The newest resumable state lies in job_state_chunk under `state_gen`; chunks of any other
-- generation are half-written or on their way out.
CREATE TABLE job (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id       INTEGER NOT NULL REFERENCES tenant (id),
    ref             TEXT    NOT NULL UNIQUE CHECK (ref GLOB 'ftjob-*' AND length(ref) <= 31),
    status          TEXT    NOT NULL CHECK (status IN ('queued', 'validating_files', 'running',
                                                       'paused', 'succeeded', 'failed', 'cancelled')),
    wanted          TEXT    NOT NULL DEFAULT 'run' CHECK (wanted IN ('run', 'pause', 'cancel')),
    model           TEXT    NOT NULL,        -- as it was asked for
    base_name       TEXT    NOT NULL,
    base_hash       BLOB    NOT NULL CHECK (length(base_hash) = 32),
    adapter_name    TEXT    NOT NULL CHECK (length(adapter_name) BETWEEN 1 AND 64),
    from_version_id INTEGER REFERENCES version (id) ON DELETE SET NULL, -- training starts from it
    from_ref        TEXT,                    -- 'support@3', also when that version is gone
    training_file   TEXT    NOT NULL,
    validation_file TEXT,
    eval_file       TEXT,                    -- of activate_if
    data_hash       BLOB    NOT NULL CHECK (length(data_hash) = 32), -- of the training file
    seed            INTEGER NOT NULL,
    params          TEXT    NOT NULL,        -- JSON: every option of the trainer
    method          TEXT    NOT NULL,        -- JSON, as clients get it back
    hyperparameters TEXT    NOT NULL,        -- the same
    metadata        TEXT,                    -- a JSON object of strings
    activate        INTEGER NOT NULL CHECK (activate IN (0, 1)),
    activate_if     TEXT,                    -- JSON
    idempotency_key TEXT,
    request_hash    BLOB    CHECK (request_hash IS NULL OR length(request_hash) = 32),
    created_ms      INTEGER NOT NULL,
    started_ms      INTEGER,                 -- first time it ran
    finished_ms     INTEGER,
    step            INTEGER NOT NULL DEFAULT 0,
    steps           INTEGER NOT NULL DEFAULT 0, -- 0: not known yet
    trained_tokens  INTEGER NOT NULL DEFAULT 0,
    seconds_per_step REAL,
    error_code      TEXT,
    error_message   TEXT,
    error_param     TEXT,
    pause_reason    TEXT,
    result_version_id INTEGER REFERENCES version (id) ON DELETE SET NULL,
    result_number   INTEGER,
    claim           INTEGER NOT NULL DEFAULT 0,
    claimed_by      TEXT,
    heartbeat_ms    INTEGER,                 -- when the runner last wrote
    state_gen       INTEGER NOT NULL DEFAULT 0,
    state_step      INTEGER,                 -- NULL: there is no state
    state_bytes     INTEGER,
    state_hash      BLOB    CHECK (state_hash IS NULL OR length(state_hash) = 32),
    UNIQUE (tenant_id, id),
    UNIQUE (tenant_id, idempotency_key)
) STRICT;
CREATE INDEX job_status ON job (status, tenant_id);
CREATE INDEX job_from ON job (from_version_id) WHERE from_version_id IS NOT NULL;
CREATE INDEX job_result ON job (result_version_id) WHERE result_version_id IS NOT NULL;

-- `step` is of metrics: one event a step, however often the step was computed.
CREATE TABLE job_event (
    tenant_id INTEGER NOT NULL,
    job_id    INTEGER NOT NULL,
    seq       INTEGER NOT NULL CHECK (seq > 0),
    at_ms     INTEGER NOT NULL,
    level     TEXT    NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type      TEXT    NOT NULL CHECK (type IN ('message', 'metrics')),
    step      INTEGER,
    message   TEXT    NOT NULL,
    data      TEXT,
    PRIMARY KEY (job_id, seq),
    FOREIGN KEY (tenant_id, job_id) REFERENCES job (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX job_event_step ON job_event (job_id, step) WHERE step IS NOT NULL;

-- One optimiser step; NULL: not measured, or not of this method.
CREATE TABLE job_metric (
    tenant_id      INTEGER NOT NULL,
    job_id         INTEGER NOT NULL,
    step           INTEGER NOT NULL CHECK (step >= 0),
    at_ms          INTEGER NOT NULL,
    epoch          REAL,
    loss           REAL,     -- mean negative log-likelihood of the step's targets
    valid_loss     REAL,
    accuracy       REAL,     -- part of targets that were the most probable
    valid_accuracy REAL,
    lr             REAL,
    grad_norm      REAL,     -- before clipping
    tokens_per_s   REAL,
    tokens         INTEGER,
    targets        INTEGER,
    orth           REAL,     -- AdaLoRA: the orthogonality term,
    threshold      REAL,     -- importance at or below which a triplet was masked,
    budget         INTEGER,  -- triplets that may stay,
    kept           INTEGER,  -- and that are there
    PRIMARY KEY (job_id, step),
    FOREIGN KEY (tenant_id, job_id) REFERENCES job (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- The rank of a module from this step on; only changes.
CREATE TABLE job_rank (
    tenant_id INTEGER NOT NULL,
    job_id    INTEGER NOT NULL,
    layer     INTEGER NOT NULL CHECK (layer >= 0),
    module    TEXT    NOT NULL,  -- as in table module
    step      INTEGER NOT NULL CHECK (step >= 0),
    rank      INTEGER NOT NULL CHECK (rank >= 0),
    PRIMARY KEY (job_id, layer, module, step),
    FOREIGN KEY (tenant_id, job_id) REFERENCES job (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX job_rank_step ON job_rank (job_id, step);

CREATE TABLE job_state_chunk (
    id        INTEGER PRIMARY KEY,
    tenant_id INTEGER NOT NULL,
    job_id    INTEGER NOT NULL,
    gen       INTEGER NOT NULL,
    chunk     INTEGER NOT NULL CHECK (chunk >= 0),
    data      BLOB    NOT NULL CHECK (length(data) BETWEEN 1 AND 4194304),
    UNIQUE (job_id, gen, chunk),
    FOREIGN KEY (tenant_id, job_id) REFERENCES job (tenant_id, id) ON DELETE CASCADE
) STRICT;

-- A servable checkpoint: a version of the job's hidden adapter.  Checkpoints of equal content share
-- a version.
CREATE TABLE job_checkpoint (
    tenant_id      INTEGER NOT NULL,
    job_id         INTEGER NOT NULL,
    step           INTEGER NOT NULL CHECK (step >= 0),
    version_id     INTEGER NOT NULL,
    created_ms     INTEGER NOT NULL,
    train_loss     REAL,
    train_accuracy REAL,
    valid_loss     REAL,
    valid_accuracy REAL,
    PRIMARY KEY (job_id, step),
    FOREIGN KEY (tenant_id, job_id) REFERENCES job (tenant_id, id) ON DELETE CASCADE,
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX job_checkpoint_version ON job_checkpoint (version_id);

-- The number of the tenant's last claim: whose is smallest comes next.
ALTER TABLE tenant ADD COLUMN last_claim INTEGER NOT NULL DEFAULT 0;
-- The hidden adapter of a job, which holds its checkpoints ("ftjob-...:ckpt"); NULL: a user's.
ALTER TABLE adapter ADD COLUMN job_id INTEGER REFERENCES job (id) ON DELETE CASCADE;
CREATE UNIQUE INDEX adapter_job ON adapter (job_id) WHERE job_id IS NOT NULL;
-- The job that made a version, and the sha256 of the file it was trained on.
ALTER TABLE version ADD COLUMN job_id INTEGER REFERENCES job (id) ON DELETE SET NULL;
ALTER TABLE version ADD COLUMN data_hash BLOB CHECK (data_hash IS NULL OR length(data_hash) = 32);
CREATE INDEX version_job ON version (job_id) WHERE job_id IS NOT NULL;

-- Adapters and versions of users; checkpoints have a view of their own.
DROP VIEW v_adapter;
CREATE VIEW v_adapter AS
SELECT t.name AS tenant, a.name AS adapter, a.live,
       max(v.number) AS newest, count(v.id) AS versions, sum(v.bytes) AS bytes,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.created_ms / 1000, 'unixepoch') AS created
FROM adapter a JOIN tenant t ON t.id = a.tenant_id LEFT JOIN version v ON v.adapter_id = a.id
WHERE a.job_id IS NULL
GROUP BY a.id;

DROP VIEW v_version;
CREATE VIEW v_version AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       v.method, v.rank_min, v.rank_max, v.alpha, v.modules, v.params, v.bytes,
       (SELECT sum(m.init_rank) FROM module m WHERE m.version_id = v.id) AS rank_before,
       (SELECT sum(m.rank) FROM module m WHERE m.version_id = v.id) AS rank_after,
       lower(hex(v.hash)) AS hash, lower(hex(v.base_hash)) AS base_hash, v.base_claimed,
       v.base_name, v.origin,
       (SELECT pa.name || '@' || p.number FROM version p JOIN adapter pa ON pa.id = p.adapter_id
        WHERE p.id = v.parent_id) AS parent,
       (SELECT j.ref FROM job j WHERE j.id = v.job_id) AS job, lower(hex(v.data_hash)) AS data_hash,
       v.init_r, v.target_r, v.tinit, v.tfinal, v.delta_t, v.total_step,
       v.train_loss, v.eval_loss, v.eval_loss_base, v.eval_tokens,
       strftime('%Y-%m-%dT%H:%M:%SZ', v.created_ms / 1000, 'unixepoch') AS created
FROM version v JOIN adapter a ON a.id = v.adapter_id JOIN tenant t ON t.id = v.tenant_id
WHERE a.job_id IS NULL;

CREATE VIEW v_file AS
SELECT t.name AS tenant, f.ref AS file, f.name, f.purpose, f.status, f.bytes,
       lower(hex(f.hash)) AS hash,
       strftime('%Y-%m-%dT%H:%M:%SZ', f.created_ms / 1000, 'unixepoch') AS created,
       strftime('%Y-%m-%dT%H:%M:%SZ', f.expires_ms / 1000, 'unixepoch') AS expires
FROM file f JOIN tenant t ON t.id = f.tenant_id;

CREATE VIEW v_job AS
SELECT t.name AS tenant, j.ref AS job, j.status, j.wanted, j.model, j.adapter_name AS adapter,
       j.params, j.from_ref, j.training_file, j.validation_file,
       j.seed, j.step, j.steps, j.trained_tokens,
       (SELECT m.loss FROM job_metric m WHERE m.job_id = j.id ORDER BY m.step DESC LIMIT 1) AS loss,
       (SELECT m.valid_loss FROM job_metric m WHERE m.job_id = j.id AND m.valid_loss IS NOT NULL
        ORDER BY m.step DESC LIMIT 1) AS valid_loss,
       j.error_code, j.error_message, j.pause_reason,
       CASE WHEN j.result_number IS NOT NULL THEN j.adapter_name || '@' || j.result_number END AS result,
       j.state_step, j.state_bytes, j.claimed_by,
       strftime('%Y-%m-%dT%H:%M:%SZ', j.created_ms / 1000, 'unixepoch') AS created,
       strftime('%Y-%m-%dT%H:%M:%SZ', j.started_ms / 1000, 'unixepoch') AS started,
       strftime('%Y-%m-%dT%H:%M:%SZ', j.finished_ms / 1000, 'unixepoch') AS finished
FROM job j JOIN tenant t ON t.id = j.tenant_id;

CREATE VIEW v_job_event AS
SELECT t.name AS tenant, j.ref AS job, e.seq,
       strftime('%Y-%m-%dT%H:%M:%SZ', e.at_ms / 1000, 'unixepoch') AS at, e.level, e.type, e.message,
       e.data
FROM job_event e JOIN job j ON j.id = e.job_id JOIN tenant t ON t.id = e.tenant_id;

CREATE VIEW v_job_metric AS
SELECT t.name AS tenant, j.ref AS job, m.step, m.epoch, m.loss, m.valid_loss, m.accuracy,
       m.valid_accuracy, m.lr, m.grad_norm, m.tokens_per_s, m.tokens, m.targets, m.orth, m.threshold,
       m.budget, m.kept
FROM job_metric m JOIN job j ON j.id = m.job_id JOIN tenant t ON t.id = m.tenant_id;

CREATE VIEW v_job_rank AS
SELECT t.name AS tenant, j.ref AS job, r.step, r.layer, r.module, r.rank
FROM job_rank r JOIN job j ON j.id = r.job_id JOIN tenant t ON t.id = r.tenant_id;

CREATE VIEW v_checkpoint AS
SELECT t.name AS tenant, j.ref AS job, c.step,
       'ft:' || j.base_name || ':' || t.name || ':' || j.adapter_name || ':' || substr(j.ref, 7)
       || ':ckpt-step-' || c.step AS model,
       v.bytes, c.train_loss, c.train_accuracy, c.valid_loss, c.valid_accuracy,
       strftime('%Y-%m-%dT%H:%M:%SZ', c.created_ms / 1000, 'unixepoch') AS created
FROM job_checkpoint c JOIN job j ON j.id = c.job_id JOIN tenant t ON t.id = c.tenant_id
     JOIN version v ON v.id = c.version_id;
