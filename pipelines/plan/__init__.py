"""Plan: says what a cache would take and whether it would pay."""
