"""What a person types and sees: arguments, the console, streams that may be gone."""
