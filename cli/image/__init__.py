"""Images, stores, caches and mirrors."""
