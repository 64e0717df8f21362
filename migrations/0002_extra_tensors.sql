-- Tensors of adapters beside the factors of LoRA, and DoRA's weight norms.
--
-- Never edit this file once it has been released: add a new one.

-- One tensor of a version that is no factor: DoRA's magnitudes, biases inside lora_B, and what takes
-- the place of the base's own.  `seq` counts from 0 in order of the names.
CREATE TABLE extra_tensor (
    tenant_id  INTEGER NOT NULL,
    version_id INTEGER NOT NULL,
    seq        INTEGER NOT NULL CHECK (seq >= 0),
    kind       TEXT    NOT NULL,  -- 'magnitude', 'lora_bias', 'bias', 'norm', 'norm_bias', ...
    layer      INTEGER NOT NULL CHECK (layer >= 0),
    part       TEXT    NOT NULL,  -- of the layer: 'q', ..., 'head'; of norms: 'attn', ..., 'final'
    name       TEXT    NOT NULL,  -- in the file, without 'base_model.model.'
    dtype      TEXT    NOT NULL,  -- 'F32', 'F16', 'BF16'
    rows       INTEGER NOT NULL CHECK (rows > 0),
    cols       INTEGER NOT NULL CHECK (cols >= 0),  -- 0: a vector
    PRIMARY KEY (version_id, seq),
    UNIQUE (version_id, name),
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- Its data, in chunks as in tensor_chunk.
CREATE TABLE extra_chunk (
    id         INTEGER PRIMARY KEY,
    tenant_id  INTEGER NOT NULL,
    version_id INTEGER NOT NULL,
    seq        INTEGER NOT NULL,
    chunk      INTEGER NOT NULL CHECK (chunk >= 0),
    data       BLOB    NOT NULL CHECK (length(data) BETWEEN 1 AND 4194304),
    UNIQUE (version_id, seq, chunk),
    FOREIGN KEY (version_id, seq) REFERENCES extra_tensor (version_id, seq) ON DELETE CASCADE,
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT;

-- DoRA: the length of each row of W + scaling B A for a module of a version, computed when it is first
-- loaded for a base and never again.  `form` is how that base was held ('nf4/f16', 'q8', ...), which
-- W depends on.  Outputs as 32-bit floats, little-endian.
CREATE TABLE weight_norm (
    id         INTEGER PRIMARY KEY,
    tenant_id  INTEGER NOT NULL,
    version_id INTEGER NOT NULL,
    seq        INTEGER NOT NULL,  -- of the module
    base_hash  BLOB    NOT NULL CHECK (length(base_hash) = 32),
    form       TEXT    NOT NULL,
    norms      BLOB    NOT NULL CHECK (length(norms) > 0),
    UNIQUE (version_id, seq, base_hash, form),
    FOREIGN KEY (version_id, seq) REFERENCES module (version_id, seq) ON DELETE CASCADE,
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT;

CREATE VIEW v_extra AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       x.kind, x.layer, x.part, x.name, x.dtype, x.rows, x.cols,
       (SELECT sum(length(c.data)) FROM extra_chunk c
        WHERE c.version_id = x.version_id AND c.seq = x.seq) AS bytes
FROM extra_tensor x JOIN version v ON v.id = x.version_id JOIN adapter a ON a.id = v.adapter_id
     JOIN tenant t ON t.id = v.tenant_id;

CREATE VIEW v_weight_norm AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, m.layer, m.module,
       lower(hex(n.base_hash)) AS base_hash, n.form, length(n.norms) / 4 AS outputs
FROM weight_norm n JOIN module m ON m.version_id = n.version_id AND m.seq = n.seq
     JOIN version v ON v.id = n.version_id JOIN adapter a ON a.id = v.adapter_id
     JOIN tenant t ON t.id = v.tenant_id;
