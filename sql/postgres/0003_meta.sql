-- One row, read by every list: how many goods there are and how many of them
-- are removed, so that nothing is ever counted; and the epoch of the cache.
-- Redis keys carry the epoch: raising it makes everything that is cached, by
-- whichever replica, unreachable at once.
CREATE TABLE meta (
    singleton   boolean NOT NULL DEFAULT true,
    total       bigint  NOT NULL,
    removed     bigint  NOT NULL,
    cache_epoch bigint  NOT NULL DEFAULT 1,
    CONSTRAINT meta_pkey PRIMARY KEY (singleton),
    CONSTRAINT meta_singleton_check CHECK (singleton),
    CONSTRAINT meta_removed_check CHECK (removed BETWEEN 0 AND total)
) WITH (fillfactor = 10); -- room for the row's next versions on its own page

INSERT INTO meta (total, removed)
SELECT count(*), count(*) FILTER (WHERE removed)
FROM goods;

CREATE FUNCTION goods_count_insert() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    UPDATE meta
    SET total = meta.total + n.total,
        removed = meta.removed + n.removed
    FROM (SELECT count(*) AS total, count(*) FILTER (WHERE removed) AS removed FROM new_goods) AS n
    WHERE n.total > 0;
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_count_insert
    AFTER INSERT ON goods
    REFERENCING NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_count_insert();

-- The row is left alone, and not locked, unless the number changes: updates
-- of different goods do not wait for each other here.
CREATE FUNCTION goods_count_update() RETURNS trigger
    LANGUAGE plpgsql AS
$$
DECLARE
    change bigint := (SELECT count(*) FROM new_goods WHERE removed)
                   - (SELECT count(*) FROM old_goods WHERE removed);
BEGIN
    IF change <> 0 THEN
        UPDATE meta SET removed = removed + change;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_count_update
    AFTER UPDATE ON goods
    REFERENCING OLD TABLE AS old_goods NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_count_update();
