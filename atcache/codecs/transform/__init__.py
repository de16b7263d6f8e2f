"""The default codec: factors in a fitted basis, rounded to equal steps."""
