"""`plan(desired, actual, now)`: the actions that bring what runs to what should run; pure."""
