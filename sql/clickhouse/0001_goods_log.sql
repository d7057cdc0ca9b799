-- Every version of every good. An event delivered twice is two rows that are
-- equal, of which FINAL, and in time a merge, leaves one. The partition comes
-- from the event's own time, so that both rows are in the same.
CREATE TABLE IF NOT EXISTS goods_log (
    Id          Int32,
    ProjectId   Int32,
    Name        String,
    Description String,
    Priority    Int32,
    Removed     UInt8,
    EventTime   DateTime('UTC'),
    Version     UInt32
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(EventTime)
ORDER BY (ProjectId, Id, Version)
