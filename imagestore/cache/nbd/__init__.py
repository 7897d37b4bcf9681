"""The NBD protocol, server side."""
