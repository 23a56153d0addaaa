"""Plug-ins for the interfaces of transformers and torch."""
