"""The REST API: `app.build(services)`. How to add an endpoint: docs/howto/add-an-endpoint.md."""
