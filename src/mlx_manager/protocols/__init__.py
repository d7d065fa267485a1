"""Wire formats ⇄ core: pure functions, no I/O."""
