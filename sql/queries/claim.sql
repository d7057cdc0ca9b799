-- Claims at most $1 events that are not published yet, and packs $2 of them
-- into a batch. A batch goes when it is full, or has waited for a second; its
-- size in characters is limited, too.
WITH claimed AS MATERIALIZED (
    SELECT *
    FROM outbox
    WHERE published_at IS NULL
    ORDER BY id
    LIMIT $1
    FOR UPDATE SKIP LOCKED
), event AS MATERIALIZED (
    SELECT id, event_time, row_to_json(claimed)::text AS text
    FROM claimed
), numbered AS (
    SELECT *, (row_number() OVER (ORDER BY id) - 1) / $2 AS batch, sum(length(text)) OVER (ORDER BY id) / 100000 AS part
    FROM event
)
SELECT array_agg(id ORDER BY id), '[' || string_agg(text, ',' ORDER BY id) || ']'
FROM numbered
GROUP BY batch, part
HAVING count(*) = $2 OR min(event_time) < clock_timestamp() - interval '1 second'
ORDER BY min(id)
