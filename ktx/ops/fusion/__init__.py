"""Several modules in one kernel call."""
