-- Claims at most $1 events that are not published yet, and packs $2 of them
-- into a batch, or fewer where a message would become too large. A batch goes
-- when no more events fit into it, or it has waited for a second.
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
    SELECT *, (row_number() OVER (ORDER BY id) - 1) / $2 AS batch, sum(octet_length(text)) OVER (ORDER BY id) / 500000 AS part
    FROM event
)
SELECT array_agg(id ORDER BY id), '[' || string_agg(text, ',' ORDER BY id) || ']'
FROM numbered
GROUP BY batch, part
HAVING count(*) = $2
    OR max(id) < (SELECT max(id) FROM claimed)
    OR min(event_time) < clock_timestamp() - interval '1 second'
ORDER BY min(id)
