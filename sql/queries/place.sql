-- Locks good $1 of project $2, and finds its place and the last one.
SELECT g.priority, (SELECT max(priority) FROM goods)
FROM goods AS g
WHERE g.id = $1
  AND g.project_id = $2
  AND NOT g.removed
FOR UPDATE OF g
