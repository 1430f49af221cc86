"""Teach a text-to-image base one subject."""
