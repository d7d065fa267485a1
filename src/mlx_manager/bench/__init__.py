"""Load on any OpenAI-compatible server, measured from the outside. Knows no engine: a peer is measured exactly as we are."""
