-- Goods, in one ordered list over all projects. A good's priority is its
-- position in that list: priorities are exactly 1..N, without gap or repeat.
CREATE TABLE goods (
    id          integer     GENERATED ALWAYS AS IDENTITY,
    project_id  integer     NOT NULL,
    name        text        NOT NULL,
    description text        NOT NULL DEFAULT '',
    priority    integer     NOT NULL,
    removed     boolean     NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now(),
    version     integer     NOT NULL DEFAULT 1,
    CONSTRAINT goods_pkey PRIMARY KEY (id, project_id),
    CONSTRAINT goods_project_id_fkey FOREIGN KEY (project_id) REFERENCES campaigns (id),
    CONSTRAINT goods_name_check CHECK (char_length(name) BETWEEN 1 AND 255),
    CONSTRAINT goods_description_check CHECK (char_length(description) <= 10000),
    CONSTRAINT goods_priority_check CHECK (priority > 0),
    -- Deferrable, so that it is checked at the end of a statement: one UPDATE
    -- can rotate a range of priorities.
    CONSTRAINT goods_priority_key UNIQUE (priority) DEFERRABLE INITIALLY IMMEDIATE
);

CREATE INDEX goods_project_id_idx ON goods (project_id);
CREATE INDEX goods_name_idx ON goods (name);

-- Whoever changes which priorities exist, or who has them, takes this lock
-- first and holds it until the end of its transaction.
CREATE FUNCTION lock_priorities() RETURNS void
    LANGUAGE sql AS
$$
    SELECT pg_advisory_xact_lock(hashtext('goods.priority'))
$$;

-- Taken once a statement: taking it again for each row would cost as much as
-- the row itself.
CREATE FUNCTION goods_lock_insert() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM lock_priorities();
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_lock_insert
    BEFORE INSERT ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_lock_insert();

-- A new good stands last. The function is VOLATILE (the default), so each of
-- its statements has a snapshot of its own: max() sees what was committed
-- while the lock was waited for, and the rows that the same INSERT has
-- already added.
CREATE FUNCTION goods_before_insert() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    NEW.priority := (SELECT coalesce(max(priority), 0) + 1 FROM goods);
    NEW.version := 1;
    RETURN NEW;
END
$$;

CREATE TRIGGER goods_before_insert
    BEFORE INSERT ON goods
    FOR EACH ROW EXECUTE FUNCTION goods_before_insert();

-- Each write of a row is a version of it. (id, version) names an event.
CREATE FUNCTION goods_before_update() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    NEW.version := OLD.version + 1;
    RETURN NEW;
END
$$;

CREATE TRIGGER goods_before_update
    BEFORE UPDATE ON goods
    FOR EACH ROW EXECUTE FUNCTION goods_before_update();

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
