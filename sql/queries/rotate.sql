-- Puts good $3 in the place $4, and moves the others between the places $1 and
-- $2 by $5. Rows are locked in the order of their ids, as in an edit.
WITH locked AS MATERIALIZED (
    SELECT id
    FROM goods
    WHERE priority BETWEEN $1 AND $2
    ORDER BY id
    FOR UPDATE
)
UPDATE goods AS g
SET priority = CASE WHEN g.id = $3 THEN $4 ELSE g.priority + $5 END,
    version = g.version + 1
WHERE g.id = ANY (ARRAY(SELECT id FROM locked))
RETURNING g.id, g.priority, g.version
