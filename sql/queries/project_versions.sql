-- What list_versions.sql says, for positions in the list of a project. A project
-- that does not exist has no row. The first priority of a page is found in the
-- index alone, so a page far down the list reads little else.
SELECT r.n, m.total, m.removed, page.bytes, page.keys
FROM unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n)
JOIN project_meta AS m ON m.project_id = r.project_id,
    LATERAL (
        SELECT coalesce(sum(octet_length(g.name) + octet_length(g.description) + 150), 0) AS bytes,
               coalesce(array_agg(g.id::bigint << 32 | g.version ORDER BY g.priority), '{}') AS keys
        FROM (
            SELECT id, version, priority, name, description
            FROM goods
            WHERE project_id = r.project_id
              AND priority >= (
                  SELECT priority
                  FROM goods
                  WHERE project_id = r.project_id
                  ORDER BY priority
                  OFFSET r.first - 1
                  LIMIT 1
              )
            ORDER BY priority
            LIMIT r.last - r.first + 1
        ) AS g
    ) AS page
