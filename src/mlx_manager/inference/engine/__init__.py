"""Tokens in, tokens out. Knows no text, no chat, no HTTP and no database."""
