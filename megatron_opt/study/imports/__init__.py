"""Runs of other programs: one reader a format, one mapping file that says what its columns mean."""
