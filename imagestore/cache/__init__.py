"""A node's images: what it holds, and the service that shows what has not arrived yet."""
