-- Goods, in one ordered list over all projects. A good's priority is its
-- position in that list: priorities are exactly 1..N, without gap or repeat.
CREATE TABLE goods (
    id              integer     GENERATED ALWAYS AS IDENTITY,
    project_id      integer     NOT NULL,
    name            text        NOT NULL,
    description     text        NOT NULL DEFAULT '',
    priority        integer     NOT NULL,
    removed         boolean     NOT NULL DEFAULT false,
    -- Not now(), which is when the transaction began: it may have waited for a
    -- lock since.
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    version         integer     NOT NULL DEFAULT 1,
    idempotency_key text,
    request_digest  text, -- of the name and description that the key was first sent with
    -- The service takes the id alone for unique: all come from one sequence.
    CONSTRAINT goods_pkey PRIMARY KEY (id, project_id),
    CONSTRAINT goods_project_id_fkey FOREIGN KEY (project_id) REFERENCES campaigns (id),
    CONSTRAINT goods_name_check CHECK (char_length(name) BETWEEN 1 AND 255),
    CONSTRAINT goods_description_check CHECK (char_length(description) <= 10000),
    CONSTRAINT goods_priority_check CHECK (priority > 0),
    -- Deferrable, so that it is checked at the end of a statement: one UPDATE
    -- can rotate a range of priorities.
    CONSTRAINT goods_priority_key UNIQUE (priority) DEFERRABLE INITIALLY IMMEDIATE
);

-- By project, and in it in the order of the list.
CREATE INDEX goods_project_id_idx ON goods (project_id, priority);
-- The users of the service asked for it, to look for a good by its name; no call
-- needs it.
CREATE INDEX goods_name_idx ON goods (name);
CREATE UNIQUE INDEX goods_idempotency_key ON goods (project_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- Every transaction that changes which priorities exist, or which goods have
-- them, takes this lock first and holds it until its end. Returns the highest
-- priority. The function is VOLATILE (the default), so it sees what was
-- committed while the lock was waited for; the statement that calls it sees
-- only what was committed before that statement began.
CREATE FUNCTION lock_priorities() RETURNS integer
    LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('goods.priority'));
    RETURN (SELECT coalesce(max(priority), 0) FROM goods);
END
$$;

-- The triggers take the same lock for statements that do not, such as those made
-- by hand, and spare them the look for the highest priority.
CREATE FUNCTION goods_lock_priorities() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('goods.priority'));
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_lock_insert
    BEFORE INSERT ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_lock_priorities();

CREATE TRIGGER goods_lock_update
    BEFORE UPDATE OF priority ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_lock_priorities();

-- A new good goes to the end. max() sees the rows that the same INSERT has
-- already added. The service gives priorities itself, which is cheaper for many
-- rows at once.
CREATE FUNCTION goods_set_priority() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    NEW.priority := (SELECT coalesce(max(priority), 0) + 1 FROM goods);
    RETURN NEW;
END
$$;

CREATE TRIGGER goods_insert_priority
    BEFORE INSERT ON goods
    FOR EACH ROW WHEN (NEW.priority IS NULL)
    EXECUTE FUNCTION goods_set_priority();

-- Each write of a row is a version of it. (id, version) names its content
-- everywhere: in the cache, and as an event.
CREATE FUNCTION goods_set_version() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    NEW.version := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE OLD.version + 1 END;
    RETURN NEW;
END
$$;

CREATE TRIGGER goods_insert_version
    BEFORE INSERT ON goods
    FOR EACH ROW WHEN (NEW.version IS DISTINCT FROM 1)
    EXECUTE FUNCTION goods_set_version();

CREATE TRIGGER goods_update_version
    BEFORE UPDATE ON goods
    FOR EACH ROW WHEN (NEW.version IS DISTINCT FROM OLD.version + 1)
    EXECUTE FUNCTION goods_set_version();

-- A deleted row would leave a gap in the priorities, and its history without
-- an end: goods are marked as removed instead.
CREATE FUNCTION goods_refuse_delete() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    RAISE EXCEPTION 'goods are never deleted: set removed instead';
END
$$;

CREATE TRIGGER goods_refuse_delete
    BEFORE DELETE OR TRUNCATE ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_refuse_delete();
