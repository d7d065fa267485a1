"""MLX Manager."""
