"""Rules on a model: rule files, device maps, and the walk that replaces modules."""
