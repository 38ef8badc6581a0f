"""What should run, what does, and the actions that bring them together: pure functions and records."""
