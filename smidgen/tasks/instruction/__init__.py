"""Teach a language model to answer."""
