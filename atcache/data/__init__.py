"""Data that comes with the package: the demo's weights and the recipes."""
