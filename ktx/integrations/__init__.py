"""The plug-in interfaces of transformers."""
