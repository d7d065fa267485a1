"""The main database: opened safely, migrated forward, never guessed at. Knows no record of its own."""
