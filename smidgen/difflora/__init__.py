"""DiffLoRA (arXiv 2408.06740): a picture in, a personal adapter out. Zoo, weight space, and what predicts."""
