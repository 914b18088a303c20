"""Many experiments as one: their jobs, records and view."""
