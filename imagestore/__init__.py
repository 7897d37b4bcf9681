"""A content-addressed image store: the package's public face, listed in `__init__.pyi`.

Whoever is outside of this package imports from here alone; a name is loaded when it is first used, so that
`import imagestore` costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
