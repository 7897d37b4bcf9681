"""Options that all of the collection has."""


class ModuleDocFragment:
    """What is said once, and meant by every module and the inventory."""

    DOCUMENTATION = r"""
options:
  api_url:
    description:
      - Where the API is. Without it E(SF_API_URL), the current context of C(sf login), or this machine's own server.
      - No key is sent over plain HTTP to another machine.
    type: str
  namespace:
    description: The namespace that the key belongs to. Without it E(SF_NAMESPACE), the context's, or C(system).
    type: str
  key:
    description:
      - The namespace's key. Without it E(SF_KEY), or that of a context of C(sf login) for the same URL; on the server's
        own machine root needs none.
    type: str
  ca_cert:
    description:
      - A file with the certificate of the authority that alone vouches for the API, whatever the host is called, as
        C(GET /admin/cacert) shows it. Without it the context's, or those that the system trusts.
    type: path
"""
