"""Trains and exports the model that ktx/demo has."""
