-- The counts, and what stands at the positions from $1 to $2, range by range,
-- in one moment. An array of numbers, the id and the version of a good in each,
-- is cheaper than rows.
SELECT m.total, m.removed, ARRAY(
    SELECT g.id::bigint << 32 | g.version
    FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS r (first, last, n)
    JOIN goods AS g ON g.priority BETWEEN r.first AND r.last
    ORDER BY r.n, g.priority)
FROM meta AS m
