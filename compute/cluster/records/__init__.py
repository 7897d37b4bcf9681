"""What the cluster remembers, a module for each noun, and what may be done to it."""
