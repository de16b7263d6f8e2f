"""Demo: attention transfer end to end on digits."""
