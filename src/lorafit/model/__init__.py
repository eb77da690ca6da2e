"""The base model: loaded, and spoken to."""
