"""What one version of an image costs who holds another: made, found, used. Derived: nothing needs it."""
