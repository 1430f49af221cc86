"""Sort pictures."""
