-- Changes the goods of a JSON array of requests, in which no good is named
-- twice; a null leaves a column as it is. Every request gets a row, with n, its
-- place in the array from 1, and an outcome:
--
--   edited   the good follows, as it is now; else the rest of the row is empty
--   changed  the good no longer has the version that the request names
--   locked   another transaction holds the good
--   missing  there is no such good, or it is removed
--
-- Rows are always locked in the order of their ids, here and in a move, so that
-- transactions wait for each other in one direction only.
WITH request AS (
    SELECT *
    FROM ROWS FROM (json_to_recordset($1)
        AS (id integer, project_id integer, name text, description text, removed boolean, version integer))
        WITH ORDINALITY AS r (id, project_id, name, description, removed, version, n)
), locked AS MATERIALIZED (
    SELECT r.n, g.id, r.version IS NULL OR r.version = g.version AS same_version
    FROM request AS r
    JOIN goods AS g ON g.id = r.id AND g.project_id = r.project_id
    WHERE NOT g.removed
    ORDER BY g.id
    FOR UPDATE OF g SKIP LOCKED
), edited AS (
    UPDATE goods AS g
    SET name = coalesce(r.name, g.name),
        description = coalesce(r.description, g.description),
        removed = r.removed,
        version = g.version + 1
    FROM locked AS l
    JOIN request AS r ON r.n = l.n
    WHERE g.id = l.id
      AND l.same_version
    RETURNING l.n, g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
)
SELECT r.n,
       CASE WHEN e.n IS NOT NULL THEN 'edited'
            WHEN l.n IS NOT NULL THEN 'changed'
            -- EXISTS sees the statement's snapshot: a good that was removed since is
            -- reported as locked here, and as missing by the next batch.
            WHEN EXISTS (
                SELECT FROM goods AS g
                WHERE g.id = r.id AND g.project_id = r.project_id AND NOT g.removed
            ) THEN 'locked'
            ELSE 'missing'
       END AS outcome,
       -- Empty, not null: the service scans them into plain fields.
       coalesce(e.id, 0), coalesce(e.project_id, 0), coalesce(e.name, ''), coalesce(e.description, ''),
       coalesce(e.priority, 0), coalesce(e.removed, false), coalesce(e.created_at, 'epoch'),
       coalesce(e.version, 0)
FROM request AS r
LEFT JOIN locked AS l ON l.n = r.n
LEFT JOIN edited AS e ON e.n = r.n
