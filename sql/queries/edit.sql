-- Locks and changes the goods of a JSON array of requests; null leaves a column
-- as it is. Rows are always locked in the order of their ids, here and in a
-- move, so that transactions wait for each other in one direction only.
WITH request AS (
    SELECT *
    FROM json_to_recordset($1) AS r (id integer, project_id integer, name text, description text, removed boolean)
), locked AS MATERIALIZED (
    SELECT g.id
    FROM goods AS g
    JOIN request AS r ON r.id = g.id AND r.project_id = g.project_id
    WHERE NOT g.removed
    ORDER BY g.id
    FOR UPDATE OF g
)
UPDATE goods AS g
SET name = coalesce(r.name, g.name),
    description = coalesce(r.description, g.description),
    removed = r.removed,
    version = g.version + 1
FROM locked
JOIN request AS r ON r.id = locked.id
WHERE g.id = locked.id
RETURNING g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
