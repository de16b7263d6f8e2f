"""The `atcache` command: one file a sub-command."""
