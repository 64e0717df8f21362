-- AdaLoRA that was trained here: what each triplet of the start was worth when the ranks became final
-- (its importance S, engine/adalora.h), as a JSON array of init_rank numbers; NULL where it is not known.
ALTER TABLE module ADD COLUMN importance TEXT
    CHECK (importance IS NULL OR importance GLOB '[[]*]');

-- How often the process that ran the job has ended without a word since its state was last kept.
ALTER TABLE job ADD COLUMN cuts INTEGER NOT NULL DEFAULT 0 CHECK (cuts >= 0);

DROP VIEW v_module;
CREATE VIEW v_module AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       m.layer, m.module, m.path, m.rank, m.init_rank, m.alpha, m.scaling, m.inputs, m.outputs,
       m.dtype, m.mask, m.importance,
       (SELECT sum(length(c.data)) FROM tensor_chunk c
        WHERE c.version_id = m.version_id AND c.seq = m.seq) AS bytes
FROM module m JOIN version v ON v.id = m.version_id JOIN adapter a ON a.id = v.adapter_id
     JOIN tenant t ON t.id = v.tenant_id;
