"""Build: runs the teacher once over a dataset and keeps its attention."""
