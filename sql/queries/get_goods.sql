-- The goods with the ids $1 in the projects $2, each with n, its place in the
-- arrays from 1.
SELECT r.n, g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
FROM unnest($1::integer[], $2::integer[]) WITH ORDINALITY AS r (id, project_id, n)
JOIN goods AS g ON g.id = r.id AND g.project_id = r.project_id
