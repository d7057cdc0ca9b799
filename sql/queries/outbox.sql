-- How many events wait, and for how many milliseconds the oldest. The ids span
-- as many rows as there are, or a few more: to count them would take too long
-- just when there are many.
SELECT coalesce(max(id) - min(id) + 1, 0),
       coalesce(extract(epoch FROM now() - (SELECT event_time FROM outbox ORDER BY id LIMIT 1)) * 1000, 0)::bigint
FROM outbox
