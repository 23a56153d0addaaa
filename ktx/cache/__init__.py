"""KV caches: growing, paged, on disk."""
