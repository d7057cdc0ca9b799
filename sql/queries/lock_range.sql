-- Waits for the locks of the goods between good $1 of project $2 and the position
-- $3, at most $4 goods away, in the order of their ids.
SELECT count(*)
FROM (
    SELECT g.id
    FROM goods AS moved
    JOIN goods AS g ON g.priority
        BETWEEN greatest(least($3, moved.priority), moved.priority - $4)
        AND least(greatest($3, moved.priority), moved.priority + $4)
    WHERE moved.id = $1
      AND moved.project_id = $2
    ORDER BY g.id
    FOR UPDATE OF g
) AS locked
