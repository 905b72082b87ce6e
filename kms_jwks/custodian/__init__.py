"""The one process of an installation that makes, rotates and destroys keys in modules."""
