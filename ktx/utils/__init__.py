"""Support of the process: versions, fork handlers, torch's defaults, JSON files."""
