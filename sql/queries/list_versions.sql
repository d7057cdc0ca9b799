-- For each range of positions, from $2 to $3: the counts, how many bytes the goods
-- there have as JSON (150 besides their texts), and the id and the version of
-- each, all in one moment. An array of numbers is cheaper than rows. $1, the
-- project, is 0 in every range.
SELECT r.n, m.total, m.removed, page.bytes, page.keys
FROM meta AS m,
    unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n),
    LATERAL (
        SELECT coalesce(sum(octet_length(g.name) + octet_length(g.description) + 150), 0) AS bytes,
               coalesce(array_agg(g.id::bigint << 32 | g.version ORDER BY g.priority), '{}') AS keys
        FROM goods AS g
        WHERE g.priority BETWEEN r.first AND r.last
    ) AS page
