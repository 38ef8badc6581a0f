"""What the user writes: apps, backends, routes and traffic, compiled and checked but not run."""
