-- How many goods there are and how many of them are removed, in all and in each
-- project, so that no list has to count.
CREATE TABLE meta (
    singleton boolean NOT NULL DEFAULT true,
    total     bigint  NOT NULL DEFAULT 0,
    removed   bigint  NOT NULL DEFAULT 0,
    CONSTRAINT meta_pkey PRIMARY KEY (singleton),
    CONSTRAINT meta_singleton_check CHECK (singleton),
    CONSTRAINT meta_removed_check CHECK (removed BETWEEN 0 AND total)
) WITH (fillfactor = 10); -- room for the row's next versions on its own page

INSERT INTO meta DEFAULT VALUES;

CREATE TABLE project_meta (
    project_id integer NOT NULL,
    total      bigint  NOT NULL DEFAULT 0,
    removed    bigint  NOT NULL DEFAULT 0,
    CONSTRAINT project_meta_pkey PRIMARY KEY (project_id),
    CONSTRAINT project_meta_project_id_fkey
        FOREIGN KEY (project_id) REFERENCES campaigns (id) ON DELETE CASCADE,
    CONSTRAINT project_meta_removed_check CHECK (removed BETWEEN 0 AND total)
) WITH (fillfactor = 10);

-- Every project has a row.
INSERT INTO project_meta (project_id) SELECT id FROM campaigns;

CREATE FUNCTION campaigns_add_meta() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    INSERT INTO project_meta (project_id) VALUES (NEW.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER campaigns_add_meta
    AFTER INSERT ON campaigns
    FOR EACH ROW EXECUTE FUNCTION campaigns_add_meta();

CREATE FUNCTION goods_count_insert() RETURNS trigger
    LANGUAGE plpgsql AS
$$
DECLARE
    change      record;
    all_more    bigint := 0;
    all_removed bigint := 0;
BEGIN
    -- Projects in their order, and meta last, here and below: transactions that
    -- wait for each other's counts do so in one direction only.
    FOR change IN
        SELECT project_id, count(*) AS more, count(*) FILTER (WHERE removed) AS more_removed
        FROM new_goods
        GROUP BY project_id
        ORDER BY project_id
    LOOP
        UPDATE project_meta
        SET total = total + change.more, removed = removed + change.more_removed
        WHERE project_id = change.project_id;
        all_more := all_more + change.more;
        all_removed := all_removed + change.more_removed;
    END LOOP;
    IF all_more <> 0 THEN
        UPDATE meta SET total = total + all_more, removed = removed + all_removed;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_count_insert
    AFTER INSERT ON goods
    REFERENCING NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_count_insert();

-- Counts that do not change are left alone, and not locked: updates of different
-- goods do not wait for each other here.
CREATE FUNCTION goods_count_update() RETURNS trigger
    LANGUAGE plpgsql AS
$$
DECLARE
    change      record;
    all_removed bigint := 0;
BEGIN
    FOR change IN
        SELECT project_id, sum(more) AS more, sum(more_removed) AS more_removed
        FROM (SELECT project_id, 1 AS more, removed::integer AS more_removed FROM new_goods
              UNION ALL
              SELECT project_id, -1, -removed::integer FROM old_goods) AS g
        GROUP BY project_id
        HAVING sum(more) <> 0 OR sum(more_removed) <> 0
        ORDER BY project_id
    LOOP
        UPDATE project_meta
        SET total = total + change.more, removed = removed + change.more_removed
        WHERE project_id = change.project_id;
        all_removed := all_removed + change.more_removed;
    END LOOP;
    IF all_removed <> 0 THEN
        UPDATE meta SET removed = removed + all_removed;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER goods_count_update
    AFTER UPDATE ON goods
    REFERENCING OLD TABLE AS old_goods NEW TABLE AS new_goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_count_update();

-- The priorities of N goods are different and positive, so they are exactly
-- 1..N if the highest is N.
CREATE FUNCTION goods_verify_priorities() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    IF (SELECT coalesce(max(priority), 0) FROM goods) <> (SELECT total FROM meta) THEN
        RAISE EXCEPTION 'priorities of goods must be 1..N without a gap';
    END IF;
    RETURN NULL;
END
$$;

-- Triggers of the same event fire in the order of their names: these verify what
-- those named goods_count_… have counted.
CREATE TRIGGER goods_verify_insert
    AFTER INSERT ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_verify_priorities();

CREATE TRIGGER goods_verify_update
    AFTER UPDATE OF priority ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION goods_verify_priorities();
