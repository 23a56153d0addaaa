"""How a weight is stored: the format table and quantization."""
