"""Model hubs: selects the files of a repository and downloads them."""
