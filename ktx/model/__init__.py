"""What a loaded model does: copies, pickles, saving, adapters, notes, self-test."""
