-- For each range of positions, from $2 to $3, all in one moment: the counts; how
-- many bytes the goods there have as JSON, which are their texts and 150 more each;
-- and the id and the version of each, in an array, which is cheaper than rows. A
-- range of at most ten positions is not worth measuring: its bytes are 0. $1 is
-- not used: the query for a project takes the same arguments.
SELECT r.n, m.total, m.removed,
       CASE
           WHEN r.last - r.first < 10 THEN 0
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
