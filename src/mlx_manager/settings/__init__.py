"""What is changed while the server runs: stored, and in force for the next request."""
