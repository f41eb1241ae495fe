-- How many data keys each version of the key-encryption key wraps now, and how often it has wrapped.
SELECT c.key_version, c.wraps, count(k.sequence)
FROM wrap_counts AS c
LEFT JOIN data_keys AS k USING (key_version)
GROUP BY c.key_version
ORDER BY c.key_version;
