"""Pages for people at /ui: the API's own client, in the same process."""
