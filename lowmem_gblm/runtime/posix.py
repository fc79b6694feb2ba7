"""What only POSIX systems have: locks that end with their process, and how much it has used."""

from lowmem_gblm.errors import RequestError

try:
    import fcntl
    import resource
except ImportError:
    raise RequestError(
        "lowmem-gblm runs on Linux and on macOS: on Windows, install it inside WSL 2"
    ) from None

__all__ = ["fcntl", "resource"]
