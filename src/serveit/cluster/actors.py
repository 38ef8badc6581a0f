"""The Ray actors around a replica and a proxy: thin shells, so that the logic inside never sees Ray."""
