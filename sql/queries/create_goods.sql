-- Creates goods from a JSON array of requests, under the lock of the priorities.
-- Every request whose project exists gets a row: n, its place in the array from
-- 1, and the good. For a key that was used before this statement began, that is
-- the good made then, and same says whether the request is equal. A key that
-- another transaction commits while this one waits for the lock is not found:
-- the unique index then refuses the whole array, and the service sends it again.
WITH request AS (
    SELECT *, CASE WHEN key IS NOT NULL THEN md5(jsonb_build_array(name, description)::text) END AS digest
    FROM ROWS FROM (json_to_recordset($1) AS (project_id integer, name text, description text, key text))
        WITH ORDINALITY AS r (project_id, name, description, key, n)
), known AS MATERIALIZED (
    -- A request without a key is equal to no row here.
    SELECT r.n, g.request_digest IS NOT DISTINCT FROM r.digest AS same,
           g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
    FROM request AS r
    JOIN goods AS g ON g.project_id = r.project_id AND g.idempotency_key = r.key
), locked AS MATERIALIZED (
    SELECT lock_priorities() AS last_priority
), planned AS MATERIALIZED (
    -- clock_timestamp() is read for the row of locked: once, and when the lock is held.
    SELECT r.n, r.project_id, r.name, r.description, r.key, r.digest,
           l.last_priority + row_number() OVER (ORDER BY r.n) AS priority,
           l.moment
    FROM (SELECT last_priority, clock_timestamp() AS moment FROM locked) AS l,
        request AS r
    JOIN campaigns AS c ON c.id = r.project_id
    WHERE r.n NOT IN (SELECT n FROM known)
), inserted AS (
    INSERT INTO goods AS g
        (project_id, name, description, priority, created_at, idempotency_key, request_digest)
    SELECT project_id, name, description, priority, moment, key, digest
    FROM planned
    ORDER BY n
    RETURNING g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
)
SELECT n, true AS repeated, same, id, project_id, name, description, priority, removed, created_at, version
FROM known
UNION ALL
SELECT p.n, false, true,
       i.id, i.project_id, i.name, i.description, i.priority, i.removed, i.created_at, i.version
FROM planned AS p
JOIN inserted AS i ON i.priority = p.priority
