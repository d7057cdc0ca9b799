-- The counts, and the goods at the positions from $1 to $2, range by range, in
-- one moment.
SELECT m.total, m.removed, g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
FROM meta AS m,
    unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS r (first, last, n)
    JOIN goods AS g ON g.priority BETWEEN r.first AND r.last
ORDER BY r.n, g.priority
