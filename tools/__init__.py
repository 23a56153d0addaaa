"""Programs for the maintenance of the repository, which the wheel does not contain."""
