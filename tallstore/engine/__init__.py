"""LMDB, keys, chunks, the manifest, transactions. Knows nothing of models; see FORMAT.md."""
