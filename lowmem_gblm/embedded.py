"""The embedded model and its texts: what "demo" means, and where it is."""

from importlib import resources
from pathlib import Path

EMBEDDED = "demo"


def is_embedded(model: str) -> bool:
    """Return whether `model` is "demo", unless a folder of that name holds a model."""
    return model == EMBEDDED and not Path(model, "config.json").exists()


def embedded_file(name: str) -> Path:
    """Return the path of an embedded file: the folder "model", or a text by its name."""
    return Path(str(resources.files("lowmem_gblm") / "demo" / name))
