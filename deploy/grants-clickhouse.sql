-- The rights of a user of ClickHouse that stores and reads events but does not migrate. Run this after
-- `goods migrate clickhouse`:
--
--   CREATE USER goods_service IDENTIFIED BY '…';
--
-- Versions without GRANT have a file of users: see clickhouse-user.xml.
GRANT SELECT, INSERT ON goods.goods_log TO goods_service;
