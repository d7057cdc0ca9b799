-- The ids of the goods between a good and a position, at most max_span goods away.
CREATE FUNCTION goods_in_range(good integer, project integer, target integer, max_span integer)
    RETURNS SETOF integer
    LANGUAGE sql STABLE AS
$$
SELECT g.id
FROM goods AS moved
JOIN goods AS g ON g.priority
    BETWEEN greatest(least(target, moved.priority), moved.priority - max_span)
    AND least(greatest(target, moved.priority), moved.priority + max_span)
WHERE moved.id = good
  AND moved.project_id = project
$$;

-- Waits for the locks of these goods, in the order of their ids: transactions that
-- lock several goods wait for each other in one direction only.
CREATE FUNCTION lock_range(good integer, project integer, target integer, max_span integer) RETURNS void
    LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM id
    FROM goods
    WHERE id IN (SELECT goods_in_range(good, project, target, max_span))
    ORDER BY id
    FOR UPDATE;
END
$$;

-- Moves goods, as a JSON array of requests says, one after the other in its
-- order. Each move is an UPDATE of its own, so every version of every good is an
-- event. Per request it returns n, the request's place in the array from 1, and
-- an outcome:
--
--   moved      keys has id << 32 | version of every good whose priority changed,
--              or of the good alone when none did; the first of them is now at
--              first_position, and the others follow it
--   missing    there is no such good, or it is removed
--   changed    the good no longer has the version that the request names
--   too long   the move would renumber more than max_span goods besides the moved
--              one; first_position is where that is now
--   locked     another transaction holds a good that would be renumbered; with
--              wait, the move waits for those goods first
--
-- It stops before a move that would take the number of renumbered goods past
-- max_batch: that move and all after it get no row, and have not begun. The first
-- move that renumbers anything is always made.
CREATE FUNCTION move_goods(requests json, max_span integer, max_batch integer, wait boolean)
    RETURNS TABLE (n bigint, outcome text, first_position integer, keys bigint[])
    LANGUAGE plpgsql AS
$$
DECLARE
    last_position integer;
    renumbered    integer := 0;
    request       record;
    found_good    record;
    target        integer;
    low           integer;
    high          integer;
    step          integer;
BEGIN
    last_position := lock_priorities(); -- held until the end of the transaction
    FOR request IN
        SELECT r.id, r.project_id, r.priority, r.version, r.number
        FROM ROWS FROM (json_to_recordset(requests)
            AS (id integer, project_id integer, priority integer, version integer))
            WITH ORDINALITY AS r (id, project_id, priority, version, number)
    LOOP
        n := request.number;
        first_position := NULL;
        keys := NULL;
        IF wait THEN
            PERFORM lock_range(request.id, request.project_id, request.priority, max_span);
        END IF;
        -- No other transaction changes priorities while this transaction has their lock.
        SELECT g.priority, g.version
        INTO found_good
        FROM goods AS g
        WHERE g.id = request.id
          AND g.project_id = request.project_id
          AND NOT g.removed;
        IF NOT FOUND THEN
            outcome := 'missing';
            RETURN NEXT;
            CONTINUE;
        END IF;
        target := least(request.priority, last_position);
        low := least(found_good.priority, target);
        high := greatest(found_good.priority, target);
        first_position := low;
        IF request.version IS NOT NULL AND found_good.version <> request.version THEN
            outcome := 'changed';
        ELSIF low = high THEN
            outcome := 'moved';
            keys := ARRAY[request.id::bigint << 32 | found_good.version];
        ELSIF high - low > max_span THEN
            outcome := 'too long';
            first_position := found_good.priority;
        ELSIF renumbered > 0 AND renumbered + high - low + 1 > max_batch THEN
            RETURN;
        ELSE
            step := CASE WHEN target = low THEN 1 ELSE -1 END;
            -- All goods of the range, or none. The moved one must still be what was
            -- found above: it can be edited or removed until it is locked here.
            WITH locked AS MATERIALIZED (
                SELECT g.id
                FROM goods AS g
                WHERE g.priority BETWEEN low AND high
                  AND (g.id <> request.id OR NOT g.removed AND g.version = found_good.version)
                ORDER BY g.id
                FOR UPDATE SKIP LOCKED
            ), moved AS (
                UPDATE goods AS g
                SET priority = CASE WHEN g.id = request.id THEN target ELSE g.priority + step END,
                    version = g.version + 1
                WHERE g.priority BETWEEN low AND high
                  AND (SELECT count(*) FROM locked) = high - low + 1
                RETURNING g.id, g.priority, g.version
            )
            SELECT array_agg(m.id::bigint << 32 | m.version ORDER BY m.priority)
            INTO keys
            FROM moved AS m;
            outcome := 'locked';
            IF keys IS NOT NULL THEN
                outcome := 'moved';
                renumbered := renumbered + high - low + 1;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;
