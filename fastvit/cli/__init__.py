"""What ``python -m fastvit`` does: a file a command, and what they share."""
