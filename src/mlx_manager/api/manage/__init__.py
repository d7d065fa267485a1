"""`/api` for whoever runs the server: one module a screen."""
