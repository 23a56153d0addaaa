"""Model hubs: which files of a repository are wanted, and how they come."""
