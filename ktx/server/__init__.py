"""The HTTP server: OpenAI's, Anthropic's and Ollama's routes over one engine."""
