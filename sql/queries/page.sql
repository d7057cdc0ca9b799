-- The counts, and the goods at the positions $1, in one moment.
SELECT m.total, m.removed, g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
FROM meta AS m, goods AS g
WHERE g.priority = ANY ($1)
ORDER BY g.priority
