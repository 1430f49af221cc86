"""Serving: a folder of adapters, many of them in one batch."""
