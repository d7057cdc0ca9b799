-- Takes the lock of the priorities, then locks good $1 of project $2, and finds
-- its place and the last one. Postgres locks the row after it has the priorities,
-- and reads it anew if it changed meanwhile.
WITH priorities AS MATERIALIZED (
    SELECT lock_last_priority() AS last
)
SELECT g.priority, priorities.last
FROM priorities, goods AS g
WHERE g.id = $1
  AND g.project_id = $2
  AND NOT g.removed
FOR UPDATE OF g
