"""Experiments as data files, the harness that runs them cell by cell, and the report on quality per byte."""
