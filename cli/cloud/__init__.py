"""Instances and networks, over the REST API."""
