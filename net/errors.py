"""What can go wrong in the data plane."""


class NetError(Exception):
    """Base of all errors of this package. `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Invalid(NetError):
    """A netblock, address, MAC or MTU breaks a rule."""


class Exhausted(NetError):
    """No free address, VNI or floating IP is left."""


class Conflict(NetError):
    """The address or MAC is taken, or a kernel object of that name has other attributes."""


class Failed(NetError):
    """The kernel, nft or dnsmasq refused; the message says which and why."""
