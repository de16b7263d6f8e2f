"""Models that use a teacher's attention."""
