"""Values that server and agent send each other."""
