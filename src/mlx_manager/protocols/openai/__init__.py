"""OpenAI chat completions, completions and models."""
