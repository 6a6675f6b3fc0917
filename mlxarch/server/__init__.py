"""HTTP server that speaks the APIs of OpenAI, Anthropic and Ollama."""
