"""Smidgen: adapters of kilobytes for large pre-trained models."""
