"""The page: the loop, and what it calls."""
