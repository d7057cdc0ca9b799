-- Claims at most $1 events that are not published yet, as JSON. An event is due
-- when it has waited for a second for others to fill its message; one whose time
-- is in the future, since the clock was set back, is due as well.
SELECT id, row_to_json(claimed)::text AS event,
       event_time NOT BETWEEN clock_timestamp() - interval '1 second' AND clock_timestamp() AS due
FROM (
    SELECT *
    FROM outbox
    WHERE published_at IS NULL
    ORDER BY id
    LIMIT $1
    FOR UPDATE SKIP LOCKED
) AS claimed
ORDER BY id
