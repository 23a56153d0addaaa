"""Process utilities: package versions, fork handlers, torch defaults, JSON files, pickles of spawned processes."""
