"""Coverage-guided fuzzing of everything that reads bytes which others made; see README.md."""
