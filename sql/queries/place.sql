-- Takes the lock of the priorities, then locks good $1 of project $2, and finds
-- its place and the last one. A row that changed while the lock was waited for
-- is read anew when it is locked.
WITH place AS MATERIALIZED (
    SELECT lock_last_priority() AS last
)
SELECT g.priority, place.last
FROM place, goods AS g
WHERE g.id = $1
  AND g.project_id = $2
  AND NOT g.removed
FOR UPDATE OF g
