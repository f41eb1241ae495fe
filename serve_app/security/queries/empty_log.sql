-- Move the write-ahead log into the file and empty it; the first column is 1 when a reader was in the way.
PRAGMA wal_checkpoint(TRUNCATE);
