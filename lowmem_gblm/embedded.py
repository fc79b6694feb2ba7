"""The embedded model and its texts: what "demo" means, and where it is."""

from importlib import resources
from pathlib import Path

EMBEDDED = "demo"
# A folder with one of these is meant as a model, even if it is not complete.
_OF_MODELS = ("config.json", "*.safetensors", "*.bin")


def is_embedded(model: str) -> bool:
    """Return whether `model` is "demo", unless a folder of that name holds files of a model."""
    return model == EMBEDDED and not any(any(Path(model).glob(one)) for one in _OF_MODELS)


def embedded_file(name: str) -> Path:
    """Return the path of an embedded file: the folder "model", or a text by its name."""
    return Path(str(resources.files("lowmem_gblm") / "demo" / name))
