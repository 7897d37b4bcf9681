"""A node acts: it compares what it must be with what it is, and reports what it saw."""
