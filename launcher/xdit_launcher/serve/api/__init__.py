"""The faces of the service: our own API, OpenAI's, and what operators ask for. Needs FastAPI."""
