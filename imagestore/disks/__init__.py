"""Disk images as their guests see them: opened, inspected, cut into chunks, written out again."""
