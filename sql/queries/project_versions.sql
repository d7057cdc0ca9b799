-- What list_versions.sql says, for positions in the list of a project. A project
-- that does not exist has no row. The first priority of a page is found in the
-- index alone, so a page far down the list reads little else.
SELECT r.n, m.total, m.removed,
       CASE
           WHEN r.last - r.first < 10 THEN 0
           ELSE (
               SELECT coalesce(sum(octet_length(g.name) + octet_length(g.description) + 150), 0)
               FROM (
                   SELECT name, description
                   FROM goods
                   WHERE project_id = r.project_id
                     AND priority >= start.priority
                   ORDER BY priority
                   LIMIT r.last - r.first + 1
               ) AS g
           )
       END AS bytes,
       ARRAY(
           SELECT g.id::bigint << 32 | g.version
           FROM goods AS g
           WHERE g.project_id = r.project_id
             AND g.priority >= start.priority
           ORDER BY g.priority
           LIMIT r.last - r.first + 1
       ) AS keys
FROM unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n)
JOIN project_meta AS m ON m.project_id = r.project_id
LEFT JOIN LATERAL (
    SELECT priority
    FROM goods
    WHERE project_id = r.project_id
    ORDER BY priority
    OFFSET r.first - 1
    LIMIT 1
) AS start ON true
