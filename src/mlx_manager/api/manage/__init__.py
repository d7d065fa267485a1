"""What is managed from a browser or a command: one file a screen."""
