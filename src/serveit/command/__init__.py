"""The command: `serveit run`, and what is asked of an instance that runs."""
