"""Fitted data that ships with the package."""
