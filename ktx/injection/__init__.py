"""Module injection: rule files, device maps, and the tree walk that replaces modules."""
