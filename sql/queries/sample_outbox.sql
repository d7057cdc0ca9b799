-- How many events wait, and for how many milliseconds the oldest; nothing if none
-- waits. The number is that of the ids from the first to the last, some of which may
-- be missing: to count rows would take too long just when there are many.
SELECT (SELECT max(id) FROM outbox) - first.id + 1,
       (greatest(extract(epoch FROM clock_timestamp() - first.event_time), 0) * 1000)::bigint
FROM (SELECT id, event_time FROM outbox ORDER BY id LIMIT 1) AS first
