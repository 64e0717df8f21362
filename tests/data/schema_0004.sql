PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE tenant (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT    NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 64),
    created_ms INTEGER NOT NULL
, last_claim INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO tenant VALUES(1,'default',1795805082393,0);
INSERT INTO tenant VALUES(2,'acme',1795805082404,1);
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
INSERT INTO access_key VALUES(1,2,X'ba68b1fb414e2e1277f6196759abd37c55b763a198a7f0be09942b425a0985cf',X'06eeca3a68ffea66','lorad_c1qrQi','laptop',1795805082404,0,0);
CREATE TABLE adapter (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id  INTEGER NOT NULL REFERENCES tenant (id),
    name       TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    live       INTEGER,
    created_ms INTEGER NOT NULL, job_id INTEGER REFERENCES job (id) ON DELETE CASCADE,
    UNIQUE (tenant_id, name),
    UNIQUE (tenant_id, id),
    FOREIGN KEY (id, live) REFERENCES version (adapter_id, number) DEFERRABLE INITIALLY DEFERRED
) STRICT;
INSERT INTO adapter VALUES(1,1,'support',2,1795805082405,NULL);
INSERT INTO adapter VALUES(2,2,'pruned',1,1795805082407,NULL);
INSERT INTO adapter VALUES(3,2,'ftjob-igxg2xb3qjwidju1:ckpt',NULL,1795805082413,1);
INSERT INTO adapter VALUES(4,2,'trained',1,1795805082415,NULL);
CREATE TABLE adapter_number (
    tenant_id INTEGER NOT NULL REFERENCES tenant (id) ON DELETE CASCADE,
    name      TEXT    NOT NULL,
    next      INTEGER NOT NULL CHECK (next > 1),
    PRIMARY KEY (tenant_id, name)
) STRICT, WITHOUT ROWID;
INSERT INTO adapter_number VALUES(1,'support',3);
INSERT INTO adapter_number VALUES(2,'pruned',2);
INSERT INTO adapter_number VALUES(2,'trained',2);
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
    created_ms   INTEGER NOT NULL, job_id INTEGER REFERENCES job (id) ON DELETE SET NULL, data_hash BLOB CHECK (data_hash IS NULL OR length(data_hash) = 32),
    UNIQUE (adapter_id, number),
    UNIQUE (adapter_id, hash, base_hash),
    UNIQUE (tenant_id, id),
    FOREIGN KEY (tenant_id, adapter_id) REFERENCES adapter (tenant_id, id) ON DELETE CASCADE
) STRICT;
INSERT INTO version VALUES(1,1,1,1,'lora',2,2,16.0,64,256,2,X'f821a18d1b90c3549ad159b260d06d9cfb9f847881d396cdb5977feac2add284',X'1111111111111111111111111111111111111111111111111111111111111111',1,'somebody/some-base','{"peft_type": "LORA", "note": "é"}','upload',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795805082405,NULL,NULL);
INSERT INTO version VALUES(2,1,1,2,'lora',2,2,16.0,64,256,2,X'832ab8411b965ef81c1e9262282fd3bc3c1b3d7533ef2d232d349de583cb9913',X'1111111111111111111111111111111111111111111111111111111111111111',1,'somebody/some-base','{"peft_type": "LORA", "note": "é"}','upload',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795805082406,NULL,NULL);
INSERT INTO version VALUES(3,2,2,1,'adalora',0,4,32.0,255,1020,6,X'48c1a274fd1b7637365cbbcc50d770e9252f422acad4c32e58bb063b21e2141d',X'1111111111111111111111111111111111111111111111111111111111111111',1,'somebody/some-base','{"peft_type": "ADALORA"}','upload',NULL,4,2,5,7,3,100,0.84999999999999997779,0.9000000000000000222,0.5,NULL,NULL,NULL,NULL,1795805082407,NULL,NULL);
INSERT INTO version VALUES(4,2,3,1,'lora',2,2,16.0,64,256,2,X'4fdf8fa4b3c1c8492b28c0fdf241732da434164ba613410b4d8ca9d23d73add7',X'1111111111111111111111111111111111111111111111111111111111111111',0,'somebody/some-base','{"peft_type": "LORA", "note": "é"}','checkpoint',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795805082413,1,X'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356');
INSERT INTO version VALUES(5,2,4,1,'lora',2,2,16.0,64,256,2,X'4fdf8fa4b3c1c8492b28c0fdf241732da434164ba613410b4d8ca9d23d73add7',X'1111111111111111111111111111111111111111111111111111111111111111',0,'somebody/some-base','{"peft_type": "LORA", "note": "é"}','train',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795805082415,1,X'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356');
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
    mask       TEXT    CHECK (mask IS NULL OR length(mask) = init_rank), importance TEXT
    CHECK (importance IS NULL OR importance GLOB '[[]*]'),
    PRIMARY KEY (version_id, seq),
    UNIQUE (version_id, layer, module),
    FOREIGN KEY (tenant_id, version_id) REFERENCES version (tenant_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
INSERT INTO module VALUES(1,1,0,0,'q','model.layers.0.self_attn.q_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(1,1,1,0,'v','model.layers.0.self_attn.v_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(1,2,0,0,'q','model.layers.0.self_attn.q_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(1,2,1,0,'v','model.layers.0.self_attn.v_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(2,3,0,0,'q','model.layers.0.self_attn.q_proj',0,4,32.0,7.9999800000500007612,8,8,'F32','0000','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,3,1,0,'v','model.layers.0.self_attn.v_proj',4,4,32.0,7.9999800000500007612,8,8,'F32','1111','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,3,2,1,'q','model.layers.1.self_attn.q_proj',1,4,32.0,7.9999800000500007612,8,8,'F32','0001','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,3,3,1,'v','model.layers.1.self_attn.v_proj',4,4,32.0,7.9999800000500007612,8,8,'F32','1111','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,3,4,2,'q','model.layers.2.self_attn.q_proj',2,4,32.0,7.9999800000500007612,8,8,'F32','0011','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,3,5,2,'v','model.layers.2.self_attn.v_proj',4,4,32.0,7.9999800000500007612,8,8,'F32','1111','[0.142857149,0.100000001,0.0769230798,0.0625]');
INSERT INTO module VALUES(2,4,0,0,'q','model.layers.0.self_attn.q_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(2,4,1,0,'v','model.layers.0.self_attn.v_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(2,5,0,0,'q','model.layers.0.self_attn.q_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
INSERT INTO module VALUES(2,5,1,0,'v','model.layers.0.self_attn.v_proj',2,2,16.0,8.0,8,8,'F32',NULL,NULL);
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
INSERT INTO tensor_chunk VALUES(1,1,1,0,'A',0,X'6c82a562cb808d10d632be89c8513ebf6c929f34ddfa8c9f63c9960ef6e348a3528c8a3fcc2f044e39a3fc5b94492f8f032e7549a20098f95befd61248a23cd7');
INSERT INTO tensor_chunk VALUES(2,1,1,0,'B',0,X'a8168839e91f803558fac9f6095d9c92791970132342aa04168bad0ae6dbb1855ddcb4749032b8fe38a6684b514a33dbbfe6476d5eeadf9e9a24b268ab923be9');
INSERT INTO tensor_chunk VALUES(3,1,1,1,'A',0,X'43ecc4699f455f0c891e9118b378c54b315ef26e3465a93f6127625c36a9e54d42ca5da87e07b03fcb76a87206397b81f3780420e5427a2084a0c14cf5d665d4');
INSERT INTO tensor_chunk VALUES(4,1,1,1,'B',0,X'75ab6f50afbf0af92d8b45ebbfb95afa1a47e61756f9c1e2d24ec2ba071c80f8a69615be3b1548d6e25560f5cf002fdaa74a9d5ec200044323c67053f265ec5b');
INSERT INTO tensor_chunk VALUES(5,1,2,0,'A',0,X'c4eab05d357007c632f3dbb48489924d552b08fe0c353a0d4a1f00acda2c463afbea67c5e8d2877c5e3bc397a659949ef8021e954e0a12274eb622b08d73211b');
INSERT INTO tensor_chunk VALUES(6,1,2,0,'B',0,X'49f82d05c6af4a39819631d9d73905d3926c4bb71a2b0123b62ed4f5db83b912d694f2f68d7bf7d4405904785961a89b14434a69b3c8cd9f3ddb8d6670b84772');
INSERT INTO tensor_chunk VALUES(7,1,2,1,'A',0,X'bf6ef18dd669f4d48304c3e4c9a948a5c2882ff2cbcc657388c638d20f7459e231fae67832b5768ea0f5e68f476374ddce8e03cc811211610c48f4ef1d3b12f8');
INSERT INTO tensor_chunk VALUES(8,1,2,1,'B',0,X'6dd389473ec7dcc6deadf0d5a88d99316ab9a8c2955864f05402028b21bc4673ce6733e2a264f44d8fadb0847ff8cf373a53793f85c6be45e4e0cd80fa090a1b');
INSERT INTO tensor_chunk VALUES(9,2,3,1,'A',0,X'1c53bc589e61807b8db3f8e040c1e7da3fc471c93b70e87c31756a4bbe7544d0a448454a037509a983d38ad3b769faaeecd6c7e1fa138b56417d6e4dd343055fead9d2d1a340143eab3198bca6166d14acbf275b1214574156d1fbe0d02cc29f504c317889c436ab490ca1a461791d5b689f4c6508a5baa0e192676434de54fc');
INSERT INTO tensor_chunk VALUES(10,2,3,1,'B',0,X'9ba16e38c0f65ba63af01fb00d8d899b7ce9f5b0dfdbcbfe53b16c76623321a7ae640f47e840cc77212b7048e6633dde757523ab898d6d39a9a503791de1a7a295ef2793449fbe1b64fba23ecdceae9390cf9bbf9162d868ba2b6b6cd4b707fdd6b6435b3c5c0ceff637520608b49fc43d0500142ff06f94ce5b5521488c7947');
INSERT INTO tensor_chunk VALUES(11,2,3,1,'E',0,X'a5fa2aad02ad28dcbd0b8315eed892f4');
INSERT INTO tensor_chunk VALUES(12,2,3,2,'A',0,X'565888f3480aaff39b064fc58cd07a8f965b66004c314ce810f9f7550656f450');
INSERT INTO tensor_chunk VALUES(13,2,3,2,'B',0,X'ac0038360d2b34f8464452df3972f05766ced5caceb48f8ce36868dc485f877c');
INSERT INTO tensor_chunk VALUES(14,2,3,2,'E',0,X'2aba6804');
INSERT INTO tensor_chunk VALUES(15,2,3,3,'A',0,X'7a5fc161fdfac1ed53dca063aac59ba6d09cd0321ee0ee4d336bd75803c6b6d85622d9525d460c4694e3fa8065b17971271a2a30f07505adc0a5bbf746d862b1405793a71ff1f94199bbb958109dd1c6bd574abb2fdfb3f2a83c50438692d460d5f32ac76365aa3efb609a9cfe0f986b1af0007b4988e23ee11d68079e533518');
INSERT INTO tensor_chunk VALUES(16,2,3,3,'B',0,X'3ea14098770e8dcc49613237ec60ec545e6438d9d6f31978f3b10979127ad1903098caa706bfad26c89d0ba1045b4a62cd63ce9ba7eebad06f6157e6069b9aa0d8b160138d5636f6f6300307dc27156b2f84d5f2d46d44c5ebf246dacacb0ba14a00e29806bc949af7ba77b3b77699b73e9a63f16439276499354ec26cc4a19a');
INSERT INTO tensor_chunk VALUES(17,2,3,3,'E',0,X'9d396ab3164c182b8013c0f3b55eb3d4');
INSERT INTO tensor_chunk VALUES(18,2,3,4,'A',0,X'c3734b2a1f258eba1614bd0a21853a1145b5fe0f5be003ff1cb74cb8a97300842fedfc526646a5d1f5ae3ab81ef1ec231a33bb25eed06daa885201350563bc80');
INSERT INTO tensor_chunk VALUES(19,2,3,4,'B',0,X'352553b71a34fe164206db9ce90b3ac0061ae56fffb4ef3b384b710b78da56df47b933c33b9438b174b63c8d5e9702e98fbad5b4da0e9802479014ccdd416a34');
INSERT INTO tensor_chunk VALUES(20,2,3,4,'E',0,X'd659830842e13afa');
INSERT INTO tensor_chunk VALUES(21,2,3,5,'A',0,X'36132f7843473a2538c7ac67f2b07821c4a2f73697c4d7cbd15193d42ed03451de79e8a0afeb18da1a548fb5306403f29b7313ffa50f8ee82317e2f2bad4105baea5e00480d856b22daa446b23296b8852ad00d17d5e1d7fbcc9e1fd7eb7e90da17f4ebca73c0dd8686537ced16d5cac72d8dded1f99f4a94604906d77c70ff4');
INSERT INTO tensor_chunk VALUES(22,2,3,5,'B',0,X'fe3e88e0600ae7c21fd742565a9ca9098effe3dbfcc326d8b29ca9b6f4b83fc2f27fb6c5370b7afe04e4ef4f0eb4fab7d7ad82a2c361a0e98fa59bb5eb37ba7803b1cb4b34a322a2ae3da99d56e6dee27f74e242992cc6267160ab1d76eb894e90241069aa280920bfa9b51c5fa592f044b7217e1f25e6a7bcef4ac677e15124');
INSERT INTO tensor_chunk VALUES(23,2,3,5,'E',0,X'571a7c7ad6dbc38198a4f09ba3413b80');
INSERT INTO tensor_chunk VALUES(24,2,4,0,'A',0,X'75bbc7530751fa31e974150cfdf93c68285dda9469ab96eb18cbd4eaa1bf41664da622d01e198cd7a86a510fc9795fbde1aa6f2da61d04853443baea1913eaa3');
INSERT INTO tensor_chunk VALUES(25,2,4,0,'B',0,X'8bba779e80d0de42d5cd009f74f2d655c51302ff09fdad5ff67422cbc5d5ca2cca046ff9860c768251bf3ed16a90921abdfb4e605d83a8a184494162f9046085');
INSERT INTO tensor_chunk VALUES(26,2,4,1,'A',0,X'b5724cd344b21e6276cf267bf50c4e57e4dba8fbf99adddcd402e5bcc10c400b115bf9199a11042e4af461c8cbb7669584bb0226b9b13ee21d975a366c046b3f');
INSERT INTO tensor_chunk VALUES(27,2,4,1,'B',0,X'5c24bc355bd5806041f146a97a36179f099d2e171215aa0b586a832c56fcd26a1e07702a6f034b3beb5c50a4dfe80ff1616332020b523349661486da0a51469c');
INSERT INTO tensor_chunk VALUES(28,2,5,0,'A',0,X'75bbc7530751fa31e974150cfdf93c68285dda9469ab96eb18cbd4eaa1bf41664da622d01e198cd7a86a510fc9795fbde1aa6f2da61d04853443baea1913eaa3');
INSERT INTO tensor_chunk VALUES(29,2,5,0,'B',0,X'8bba779e80d0de42d5cd009f74f2d655c51302ff09fdad5ff67422cbc5d5ca2cca046ff9860c768251bf3ed16a90921abdfb4e605d83a8a184494162f9046085');
INSERT INTO tensor_chunk VALUES(30,2,5,1,'A',0,X'b5724cd344b21e6276cf267bf50c4e57e4dba8fbf99adddcd402e5bcc10c400b115bf9199a11042e4af461c8cbb7669584bb0226b9b13ee21d975a366c046b3f');
INSERT INTO tensor_chunk VALUES(31,2,5,1,'B',0,X'5c24bc355bd5806041f146a97a36179f099d2e171215aa0b586a832c56fcd26a1e07702a6f034b3beb5c50a4dfe80ff1616332020b523349661486da0a51469c');
CREATE TABLE audit (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id INTEGER NOT NULL,
    at_ms     INTEGER NOT NULL,
    key_id    INTEGER,
    action    TEXT    NOT NULL,  -- 'adapter.put', 'key.revoke', ...
    object    TEXT    NOT NULL   -- 'support@3', 'acme', 'key 7'
) STRICT;
INSERT INTO audit VALUES(1,2,1795805082404,NULL,'tenant.add','acme');
INSERT INTO audit VALUES(2,2,1795805082404,NULL,'key.create','key 1');
INSERT INTO audit VALUES(3,1,1795805082405,NULL,'adapter.put','support@1');
INSERT INTO audit VALUES(4,1,1795805082405,NULL,'adapter.promote','support@1');
INSERT INTO audit VALUES(5,1,1795805082406,NULL,'adapter.put','support@2');
INSERT INTO audit VALUES(6,1,1795805082406,NULL,'adapter.promote','support@2');
INSERT INTO audit VALUES(7,2,1795805082407,NULL,'adapter.put','pruned@1');
INSERT INTO audit VALUES(8,2,1795805082407,NULL,'adapter.promote','pruned@1');
INSERT INTO audit VALUES(9,2,1795805082409,NULL,'file.put','file-tobjwbgdmuuz0ln3 data.jsonl');
INSERT INTO audit VALUES(10,2,1795805082410,NULL,'job.create','ftjob-igxg2xb3qjwidju1');
INSERT INTO audit VALUES(11,2,1795805082415,NULL,'adapter.put','trained@1');
INSERT INTO audit VALUES(12,2,1795805082415,NULL,'adapter.promote','trained@1');
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
INSERT INTO file VALUES(1,2,'file-tobjwbgdmuuz0ln3','data.jsonl','fine-tune','processed',3,X'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356',1795805082408,NULL);
CREATE TABLE file_chunk (
    id        INTEGER PRIMARY KEY,
    tenant_id INTEGER NOT NULL,
    file_id   INTEGER NOT NULL,
    chunk     INTEGER NOT NULL CHECK (chunk >= 0),
    data      BLOB    NOT NULL CHECK (length(data) BETWEEN 1 AND 4194304),
    UNIQUE (file_id, chunk),
    FOREIGN KEY (tenant_id, file_id) REFERENCES file (tenant_id, id) ON DELETE CASCADE
) STRICT;
INSERT INTO file_chunk VALUES(1,2,1,0,X'7b7d0a');
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
    state_hash      BLOB    CHECK (state_hash IS NULL OR length(state_hash) = 32), cuts INTEGER NOT NULL DEFAULT 0 CHECK (cuts >= 0),
    UNIQUE (tenant_id, id),
    UNIQUE (tenant_id, idempotency_key)
) STRICT;
INSERT INTO job VALUES(1,2,'ftjob-igxg2xb3qjwidju1','succeeded','run','base','base',X'1111111111111111111111111111111111111111111111111111111111111111','trained',NULL,NULL,'file-tobjwbgdmuuz0ln3',NULL,NULL,X'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356',1,'{}','{}','{}','{"k":"v"}',1,NULL,NULL,NULL,1795805082410,1795805082412,1795805082415,1,2,9,NULL,NULL,NULL,NULL,NULL,5,1,1,'fixture',1795805082413,1,NULL,NULL,NULL,0);
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
INSERT INTO job_event VALUES(2,1,1,1795805082410,'info','message',NULL,'Created fine-tuning job: ftjob-igxg2xb3qjwidju1',NULL);
INSERT INTO job_event VALUES(2,1,2,1795805082411,'info','message',NULL,'Validating training file: file-tobjwbgdmuuz0ln3',NULL);
INSERT INTO job_event VALUES(2,1,3,1795805082412,'info','message',NULL,'Fine-tuning job started: 2 steps',NULL);
INSERT INTO job_event VALUES(2,1,4,1795805082415,'info','message',NULL,'New fine-tuned model created: ft:base:acme:trained:igxg2xb3qjwidju1 (trained@1, live)',NULL);
INSERT INTO job_event VALUES(2,1,5,1795805082415,'info','message',NULL,'The job has successfully completed',NULL);
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
INSERT INTO job_metric VALUES(2,1,1,1795805082413,0.0,2.5,0.0,0.0,0.0,0.0,0.0,0.0,0,0,0.0,0.0,0,0);
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
INSERT INTO job_rank VALUES(2,1,0,'q',1,2);
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
INSERT INTO job_checkpoint VALUES(2,1,1,4,1795805082413,0.0,0.0,0.0,0.0);
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('tenant',2);
INSERT INTO sqlite_sequence VALUES('audit',12);
INSERT INTO sqlite_sequence VALUES('access_key',1);
INSERT INTO sqlite_sequence VALUES('adapter',4);
INSERT INTO sqlite_sequence VALUES('version',5);
INSERT INTO sqlite_sequence VALUES('file',1);
INSERT INTO sqlite_sequence VALUES('job',1);
CREATE INDEX access_key_tenant ON access_key (tenant_id);
CREATE INDEX version_adapter ON version (tenant_id, adapter_id);
CREATE INDEX version_parent ON version (parent_id);
CREATE INDEX audit_tenant ON audit (tenant_id, id);
CREATE VIEW v_key AS
SELECT k.id, t.name AS tenant, k.prefix, k.label, k.revoked_ms > 0 AS revoked,
       strftime('%Y-%m-%dT%H:%M:%SZ', k.created_ms / 1000, 'unixepoch') AS created,
       strftime('%Y-%m-%dT%H:%M:%SZ', nullif(k.last_used_ms, 0) / 1000, 'unixepoch') AS last_used
FROM access_key k JOIN tenant t ON t.id = k.tenant_id;
CREATE VIEW v_audit AS
SELECT u.id, strftime('%Y-%m-%dT%H:%M:%SZ', u.at_ms / 1000, 'unixepoch') AS at,
       coalesce(t.name, 'tenant ' || u.tenant_id) AS tenant, u.key_id, u.action, u.object
FROM audit u LEFT JOIN tenant t ON t.id = u.tenant_id;
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
CREATE INDEX file_expires ON file (expires_ms) WHERE expires_ms IS NOT NULL;
CREATE INDEX file_pending ON file (created_ms) WHERE status = 'pending';
CREATE INDEX job_status ON job (status, tenant_id);
CREATE INDEX job_from ON job (from_version_id) WHERE from_version_id IS NOT NULL;
CREATE INDEX job_result ON job (result_version_id) WHERE result_version_id IS NOT NULL;
CREATE UNIQUE INDEX job_event_step ON job_event (job_id, step) WHERE step IS NOT NULL;
CREATE INDEX job_rank_step ON job_rank (job_id, step);
CREATE INDEX job_checkpoint_version ON job_checkpoint (version_id);
CREATE UNIQUE INDEX adapter_job ON adapter (job_id) WHERE job_id IS NOT NULL;
CREATE INDEX version_job ON version (job_id) WHERE job_id IS NOT NULL;
CREATE VIEW v_adapter AS
SELECT t.name AS tenant, a.name AS adapter, a.live,
       max(v.number) AS newest, count(v.id) AS versions, sum(v.bytes) AS bytes,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.created_ms / 1000, 'unixepoch') AS created
FROM adapter a JOIN tenant t ON t.id = a.tenant_id LEFT JOIN version v ON v.adapter_id = a.id
WHERE a.job_id IS NULL
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
CREATE VIEW v_module AS
SELECT t.name AS tenant, a.name AS adapter, v.number AS version, a.live IS v.number AS live,
       m.layer, m.module, m.path, m.rank, m.init_rank, m.alpha, m.scaling, m.inputs, m.outputs,
       m.dtype, m.mask, m.importance,
       (SELECT sum(length(c.data)) FROM tensor_chunk c
        WHERE c.version_id = m.version_id AND c.seq = m.seq) AS bytes
FROM module m JOIN version v ON v.id = m.version_id JOIN adapter a ON a.id = v.adapter_id
     JOIN tenant t ON t.id = v.tenant_id;
COMMIT;
PRAGMA application_id = 1280266817;
PRAGMA user_version = 4;
