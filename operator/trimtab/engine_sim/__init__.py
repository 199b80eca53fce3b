"""A simulated vLLM server: one engine model, stepped in simulated or in real time."""
