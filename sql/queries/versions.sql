-- The counts, and what stands at the positions $1, in one moment. An array of
-- numbers, the id and the version of a good in each, is cheaper than rows.
-- = ANY finds a page by the index; a range, or LIMIT, would not once its plan
-- is generic.
SELECT m.total, m.removed, ARRAY(
    SELECT g.id::bigint << 32 | g.version
    FROM goods AS g
    WHERE g.priority = ANY ($1)
    ORDER BY g.priority)
FROM meta AS m
