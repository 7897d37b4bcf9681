"""Functions of values: from what is wanted and what is there to what must be done."""
