-- What list_goods.sql says, for positions in the list of a project.
SELECT r.n, m.total, m.removed,
       g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version
FROM unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n)
JOIN project_meta AS m ON m.project_id = r.project_id,
    LATERAL (
        SELECT priority
        FROM goods
        WHERE project_id = r.project_id
        ORDER BY priority
        OFFSET r.first - 1
        LIMIT 1
    ) AS start,
    LATERAL (
        SELECT *
        FROM goods
        WHERE project_id = r.project_id
          AND priority >= start.priority
        ORDER BY priority
        LIMIT r.last - r.first + 1
    ) AS g
ORDER BY r.n, g.priority
