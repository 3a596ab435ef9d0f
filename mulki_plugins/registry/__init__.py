"""Names and what they stand for: parts, where they come from, and what options they take."""
