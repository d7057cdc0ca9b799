-- The rights that a role needs that serves but does not migrate. The owner of the database runs this after
-- `goods migrate postgres`, at first and after each upgrade:
--
--   CREATE ROLE goods_service LOGIN PASSWORD '…';
--   \i grants-postgres.sql
GRANT USAGE ON SCHEMA public TO goods_service;
GRANT SELECT ON campaigns, goods, meta, project_meta, outbox, schema_migrations TO goods_service;
GRANT INSERT, UPDATE ON goods TO goods_service;
GRANT UPDATE ON meta, project_meta TO goods_service;
GRANT INSERT, UPDATE, DELETE ON outbox TO goods_service;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO goods_service;
