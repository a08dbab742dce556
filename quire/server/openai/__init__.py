"""The endpoints that OpenAI's clients use, and vLLM's extras to them. Knows no sockets and no keys."""
