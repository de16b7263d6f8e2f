"""Pipelines: a config, a pure plan, idempotent tasks, a run."""
