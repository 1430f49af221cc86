"""What proves our claims; only the command line imports it."""
