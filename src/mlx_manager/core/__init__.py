"""The vocabulary: frozen values that every other package speaks. Imports nothing of ours."""
