"""Anthropic messages and the counting of their tokens."""
