"""One guest on this node: its record, disks, taps, console and config drive."""
