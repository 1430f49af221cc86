"""Measurements behind the README's figures: ``python -m benchmarks.NAME`` writes ``benchmarks/results/NAME.json``."""
