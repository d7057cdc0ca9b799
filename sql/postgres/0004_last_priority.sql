-- Takes the lock of the priorities, and then reads the highest. The function is
-- VOLATILE (the default), so it sees what was committed while the lock was
-- waited for; the statement that calls it sees only what was committed before
-- that statement began. It saves a statement of its own for the lock.
CREATE FUNCTION lock_last_priority() RETURNS integer
    LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM lock_priorities();
    RETURN (SELECT coalesce(max(priority), 0) FROM goods);
END
$$;
