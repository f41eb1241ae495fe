-- Whether there is a data key in this store, or was one of an image that is erased.
SELECT EXISTS (SELECT 1 FROM data_keys) OR EXISTS (SELECT 1 FROM destroyed_keys);
