"""Many experiments as one piece of work."""
