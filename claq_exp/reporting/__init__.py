"""From numbers to files, tables and pictures."""
