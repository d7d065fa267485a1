"""Local models: loading them, and the path of one request through one of them."""
