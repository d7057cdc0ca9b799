-- The transactional outbox: every version of every good waits here, from the
-- transaction that wrote it until ClickHouse holds it.
CREATE TABLE outbox (
    id           bigint      GENERATED ALWAYS AS IDENTITY,
    good_id      integer     NOT NULL,
    project_id   integer     NOT NULL,
    name         text        NOT NULL,
    description  text        NOT NULL,
    priority     integer     NOT NULL,
    removed      boolean     NOT NULL,
    version      integer     NOT NULL,
    event_time   timestamptz NOT NULL,
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

-- By which events are found that NATS has lost.
CREATE INDEX outbox_published_idx ON outbox (published_at) WHERE published_at IS NOT NULL;

-- A trigger, so that no write can be forgotten, not even one made by hand. All
-- events of a statement have one time, read when the rows are locked: versions
-- of a good then follow each other in time as well.
CREATE FUNCTION goods_write_events() RETURNS trigger
    LANGUAGE plpgsql AS
$$
DECLARE
    moment timestamptz := clock_timestamp();
BEGIN
    INSERT INTO outbox (good_id, project_id, name, description, priority, removed, version, event_time)
    SELECT id, project_id, name, description, priority, removed, version, moment
    FROM new_goods
    ORDER BY id;
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_events_insert
    AFTER INSERT ON goods
    REFERENCING NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_write_events();

CREATE TRIGGER goods_events_update
    AFTER UPDATE ON goods
    REFERENCING NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_write_events();
