"""Fixed augmentations of samples: drawn once, stored as numbers, replayed exactly."""
