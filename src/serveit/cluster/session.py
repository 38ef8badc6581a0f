"""The way into a Ray cluster and out of it: joins one or starts one, and leaves nothing behind."""
