"""What is done with a trained generator: predict, edit, blend, invert, sample, refine."""
