-- For each range of positions, from $2 to $3: the counts and the goods there, all
-- in one moment. $1 is not used: the query for a project takes the same arguments.
SELECT r.n, m.total, m.removed,
       g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
FROM meta AS m,
    unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n)
JOIN goods AS g ON g.priority BETWEEN r.first AND r.last
ORDER BY r.n, g.priority
