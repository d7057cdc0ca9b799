-- Creates goods from a JSON array of requests, under the lock of the priorities.
-- A request whose key is known yields the good of that key, with n, the place of
-- the request in the array from 1, and whether it is the same request. One for a
-- project that does not exist yields nothing. Each of the others yields a new
-- good, with an n of 0, in their order. A key that another transaction uses while
-- this one waits for the lock is not known yet: the unique index then refuses the
-- whole array, and the service sends it again.
WITH request AS (
    SELECT *, CASE WHEN key IS NOT NULL THEN md5(jsonb_build_array(name, description)::text) END AS digest
    FROM ROWS FROM (json_to_recordset($1) AS (project_id integer, name text, description text, key text))
        WITH ORDINALITY AS r (project_id, name, description, key, n)
), known AS MATERIALIZED (
    -- A key that is null finds nothing at once.
    SELECT r.n, g.request_digest IS NOT DISTINCT FROM r.digest AS same,
           g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
    FROM request AS r
    JOIN goods AS g ON g.project_id = r.project_id AND g.idempotency_key = r.key
), priorities AS MATERIALIZED (
    SELECT lock_last_priority() AS last
), inserted AS (
    INSERT INTO goods AS g (project_id, name, description, priority, idempotency_key, request_digest)
    SELECT r.project_id, r.name, r.description,
           priorities.last + row_number() OVER (ORDER BY r.n), r.key, r.digest
    FROM priorities, request AS r
    JOIN campaigns AS c ON c.id = r.project_id
    WHERE r.n NOT IN (SELECT n FROM known)
    ORDER BY r.n
    RETURNING 0 AS n, true AS same,
              g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
)
SELECT * FROM known
UNION ALL
SELECT * FROM inserted
ORDER BY n, priority
