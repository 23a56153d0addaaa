"""OpenAI's chat and completions routes."""
