"""Exception classes that more than one wing raises or handles; each message says what is wrong and what to do."""


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message names the file and the reason."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


class ImageReadError(RuntimeError):
    """An image that cannot be used; the message names the file, its index and its class where they are known."""
