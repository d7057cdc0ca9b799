-- The ids of the goods of goods_in_range($1, $2, $3, $4) that other transactions
-- have locked. The others are locked by this one, until it has looked at all.
WITH in_range AS MATERIALIZED (
    SELECT goods_in_range($1, $2, $3, $4) AS id
), free AS MATERIALIZED (
    SELECT id
    FROM goods
    WHERE id IN (SELECT id FROM in_range)
    FOR UPDATE SKIP LOCKED
)
SELECT ARRAY(SELECT id FROM in_range EXCEPT SELECT id FROM free)
