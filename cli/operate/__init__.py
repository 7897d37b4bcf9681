"""Servers, nodes, namespaces and keys."""
