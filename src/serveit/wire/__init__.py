"""Bytes between processes: frames, and links that carry them for many requests at once."""
