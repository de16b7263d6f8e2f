"""Train and evaluate: students from a cache, and the runs they are compared with."""
