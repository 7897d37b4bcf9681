"""What an NBD client and its server agree on before transmission (`server`): options in, answers out, no I/O.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, structured replies,
`base:allocation`). A client may send OPTIONS_MAX options.
"""

import struct

MAX_REQUEST_BYTES = 32 << 20  # what the protocol lets a client expect without asking (and qemu's own limit)
OPTIONS_MAX = 64
OPTION_MAX_BYTES = 8192  # a name has up to 4,096 bytes; queries of meta contexts add some
CONTEXT_ID = 1

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_REPLY_MAGIC = 0x0003E889045565A9
# FIXED_NEWSTYLE | NO_ZEROES
GREETING = struct.pack(">QQH", _NBDMAGIC, _IHAVEOPT, 3)

_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO, _STRUCTURED_REPLY, _LIST_META, _SET_META = 1, 2, 3, 6, 7, 8, 9, 10
_ACK, _SERVER, _REP_INFO, _META_CONTEXT = 1, 2, 3, 4
_ERR_UNSUP, _ERR_INVALID, _ERR_UNKNOWN = ((1 << 31) + code for code in (1, 3, 6))
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
# HAS_FLAGS, READ_ONLY, SEND_DF, CAN_MULTI_CONN
_EXPORT_FLAGS = 1 | 2 | 128 | 256
_CONTEXT = b"base:allocation"

_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")


class Broken(Exception):
    """The client broke the protocol: its connection ends."""


class Handshake:
    """One client's, after GREETING was sent to it. The export is the default one, without a name."""

    def __init__(self, size_bytes: int) -> None:
        self.agreed = self.aborted = False
        """How it ended: the next message is a request, or the client wants no more."""
        self.structured = self.context = False
        """What was agreed on: structured replies, `base:allocation` in them."""
        self._size_bytes = size_bytes
        self._greeted = False  # whether the client's flags have come
        self._options = 0

    def step(self, buffer: bytearray) -> bytes | None:
        """Take one message out of the buffer; the answer to it, or None if it is not whole yet. Raises Broken."""
        if not self._greeted:
            return self._client_flags(buffer)
        if len(buffer) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(buffer)
        if magic != _IHAVEOPT or self._options == OPTIONS_MAX or length > OPTION_MAX_BYTES:
            raise Broken("bad option")
        end = _OPTION.size + length
        if len(buffer) < end:
            return None
        self._options += 1
        payload = bytes(buffer[_OPTION.size : end])
        del buffer[:end]
        return self._choose(option, payload)

    def _client_flags(self, buffer: bytearray) -> bytes | None:
        if len(buffer) < 4:
            return None
        (flags,) = struct.unpack_from(">I", buffer)
        if flags & ~3 or not flags & 1:
            raise Broken("unknown client flags")
        self._greeted = True
        del buffer[:4]
        return b""

    def _choose(self, option: int, payload: bytes) -> bytes:
        if option == _EXPORT_NAME:  # what clients said before there was _GO (2016); no answer says no to it
            raise Broken("the export is asked for in an old way")
        if option == _ABORT:
            self.aborted = True
            return _answer(option, _ACK)
        if option == _LIST and not payload:
            return _answer(option, _SERVER, bytes(4)) + _answer(option, _ACK)  # one, whose name has no bytes
        if option == _STRUCTURED_REPLY and not payload:
            self.structured = True
            return _answer(option, _ACK)
        if option in (_INFO, _GO):
            return self._describe(option, payload)
        if option in (_LIST_META, _SET_META):
            return self._contexts(option, payload)
        return _answer(option, _ERR_INVALID if option in (_LIST, _STRUCTURED_REPLY) else _ERR_UNSUP)

    def _describe(self, option: int, payload: bytes) -> bytes:
        name, rest = _counted(payload)
        if name is None or len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
            return _answer(option, _ERR_INVALID)
        if name:
            return _answer(option, _ERR_UNKNOWN)
        self.agreed = option == _GO
        export = struct.pack(">HQH", _INFO_EXPORT, self._size_bytes, _EXPORT_FLAGS)
        block = struct.pack(">HIII", _INFO_BLOCK_SIZE, 1, 4096, MAX_REQUEST_BYTES)
        return _answer(option, _REP_INFO, export) + _answer(option, _REP_INFO, block) + _answer(option, _ACK)

    def _contexts(self, option: int, payload: bytes) -> bytes:
        name, rest = _counted(payload)
        if option == _SET_META:
            self.context = False
        if name is None or len(rest) < 4 or not self.structured:
            return _answer(option, _ERR_INVALID)
        if name:
            return _answer(option, _ERR_UNKNOWN)
        count, rest = int.from_bytes(rest[:4], "big"), rest[4:]
        wanted = option == _LIST_META and not count
        for _ in range(count):
            query, rest = _counted(rest)
            if query is None:
                return _answer(option, _ERR_INVALID)
            wanted = wanted or query == _CONTEXT or (query == b"base:" and option == _LIST_META)
        if rest:
            return _answer(option, _ERR_INVALID)
        if not wanted:
            return _answer(option, _ACK)
        self.context = self.context or option == _SET_META
        context = struct.pack(">I", CONTEXT_ID) + _CONTEXT
        return _answer(option, _META_CONTEXT, context) + _answer(option, _ACK)


def _answer(option: int, kind: int, payload: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(_REPLY_MAGIC, option, kind, len(payload)) + payload


def _counted(data: bytes) -> tuple[bytes | None, bytes]:
    """Split off a string with a 32-bit length before it; None if it is cut short."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length:
        return None, data
    return data[4 : 4 + length], data[4 + length :]
