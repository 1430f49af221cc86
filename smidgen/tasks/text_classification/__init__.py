"""Sort texts, or pairs of texts, or give them a number."""
