"""Who answers a request, and what became of it."""
