"""How a number is stored: the format table and quantization."""
