"""What is written down and shown while a run goes on."""
