"""OpenAI's chat completions and completions APIs, and vLLM's tokenize routes."""
