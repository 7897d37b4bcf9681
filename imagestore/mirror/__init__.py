"""A mirror: carry images for others, sign their names, serve them (needs the extra `mirror`).

The room's public face, listed in `__init__.pyi`; each name is loaded when it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
