"""The file: adapters on disk, and what can be done with them."""
