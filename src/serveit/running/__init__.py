"""Where user code runs: a replica admits, binds, runs and encodes what arrives over its links."""
