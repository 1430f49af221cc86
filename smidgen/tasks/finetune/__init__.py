"""What the transformers tasks share: the course of a fine-tuning, its settings and its report."""
