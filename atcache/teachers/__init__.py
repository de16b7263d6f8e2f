"""Models by name: their weights, input, parts and precision."""
