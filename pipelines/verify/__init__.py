"""Verify: proves that a cache is what its build wrote."""
