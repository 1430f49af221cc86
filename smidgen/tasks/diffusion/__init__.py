"""What the text-to-image tasks share: the denoising task, learning rates, the gallery."""
