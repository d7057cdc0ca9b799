-- One row, read by every list: how many goods there are and how many of them
-- are removed, so that nothing is ever counted.
CREATE TABLE meta (
    singleton boolean NOT NULL DEFAULT true,
    total     bigint  NOT NULL DEFAULT 0,
    removed   bigint  NOT NULL DEFAULT 0,
    CONSTRAINT meta_pkey PRIMARY KEY (singleton),
    CONSTRAINT meta_singleton_check CHECK (singleton),
    CONSTRAINT meta_removed_check CHECK (removed BETWEEN 0 AND total)
) WITH (fillfactor = 10); -- room for the row's next versions on its own page

INSERT INTO meta DEFAULT VALUES;

-- Every version of every good waits here, from the transaction that wrote it
-- until ClickHouse holds it.
CREATE TABLE outbox (
    id           bigint      GENERATED ALWAYS AS IDENTITY,
    good_id      integer     NOT NULL,
    project_id   integer     NOT NULL,
    name         text        NOT NULL,
    description  text        NOT NULL,
    priority     integer     NOT NULL,
    removed      boolean     NOT NULL,
    version      integer     NOT NULL,
    event_time   timestamptz NOT NULL DEFAULT now(),
    published_at timestamptz, -- null until NATS has acknowledged it
    CONSTRAINT outbox_pkey PRIMARY KEY (id)
) WITH (
    -- Every row is updated once and deleted soon after. By default autovacuum
    -- waits until a fifth of the table is dead and then takes pauses; here it
    -- comes whenever a thousand rows are dead, and hurries.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_threshold = -1,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 10000
);

-- What the relay claims, in its order.
CREATE INDEX outbox_unpublished_idx ON outbox (id) WHERE published_at IS NULL;

-- Triggers, so that no write can be forgotten, not even one made by hand.
CREATE FUNCTION goods_after_insert() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    INSERT INTO outbox (good_id, project_id, name, description, priority, removed, version)
    SELECT id, project_id, name, description, priority, removed, version
    FROM new_goods
    ORDER BY id;

    UPDATE meta
    SET total = meta.total + n.total,
        removed = meta.removed + n.removed
    FROM (SELECT count(*) AS total, count(*) FILTER (WHERE removed) AS removed FROM new_goods) AS n
    WHERE n.total > 0;

    RETURN NULL;
END
$$;

CREATE TRIGGER goods_after_insert
    AFTER INSERT ON goods
    REFERENCING NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_after_insert();

-- meta is left alone, and not locked, unless a number changes: updates of
-- different goods do not wait for each other here.
CREATE FUNCTION goods_after_update() RETURNS trigger
    LANGUAGE plpgsql AS
$$
DECLARE
    change bigint := (SELECT count(*) FROM new_goods WHERE removed)
                   - (SELECT count(*) FROM old_goods WHERE removed);
BEGIN
    INSERT INTO outbox (good_id, project_id, name, description, priority, removed, version)
    SELECT id, project_id, name, description, priority, removed, version
    FROM new_goods
    ORDER BY id;

    IF change <> 0 THEN
        UPDATE meta SET removed = removed + change;
    END IF;

    RETURN NULL;
END
$$;

CREATE TRIGGER goods_after_update
    AFTER UPDATE ON goods
    REFERENCING OLD TABLE AS old_goods NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_after_update();

-- The priorities of N goods are different and positive, so they are exactly
-- 1..N if the highest is N.
CREATE FUNCTION goods_check_priorities() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    IF (SELECT coalesce(max(priority), 0) FROM goods) <> (SELECT total FROM meta) THEN
        RAISE EXCEPTION 'priorities of goods must be 1..N without a gap';
    END IF;
    RETURN NULL;
END
$$;

-- By name, triggers of the same event fire in order: this one after the one that counts.
CREATE TRIGGER goods_check_insert
    AFTER INSERT ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_check_priorities();

CREATE TRIGGER goods_check_update
    AFTER UPDATE OF priority ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_check_priorities();
