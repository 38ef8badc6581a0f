"""What travels to a replica: a reference to the app wherever it can be imported, by value only where not."""
