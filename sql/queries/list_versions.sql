-- For each range of positions, from $2 to $3: the counts, how many bytes the goods
-- there have as JSON (their texts and 150 more; 0 for five goods or less, which
-- are not worth measuring), and the id and the version of each, all in one moment. An array of
-- numbers is cheaper than rows. $1, the project, is 0 in every range.
SELECT r.n, m.total, m.removed,
       CASE
           WHEN r.last - r.first < 5 THEN 0
           ELSE (
               SELECT coalesce(sum(octet_length(g.name) + octet_length(g.description) + 150), 0)
               FROM goods AS g
               WHERE g.priority BETWEEN r.first AND r.last
           )
       END AS bytes,
       ARRAY(
           SELECT g.id::bigint << 32 | g.version
           FROM goods AS g
           WHERE g.priority BETWEEN r.first AND r.last
           ORDER BY g.priority
       ) AS keys
FROM meta AS m,
    unnest($1::integer[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (project_id, first, last, n)
