"""What is relied on in a serving engine, and whether the one that is installed keeps to it."""

import importlib
import importlib.metadata
import inspect


def unsupported(package: str, series: str, signatures: dict[str, str | None]) -> str | None:
    """Why the installed `package` is not the one that was written for; None if it is.

    series      the versions that are supported: "0.33" is 0.33.0, 0.33.1, ...
    signatures  "module:function" or "module:Class.method", and the names of its parameters; None: it only has to be there
    """
    version = importlib.metadata.version(package)
    if not f"{version}.".startswith(f"{series}."):
        return (
            f"{package}: got {version}, expected {series}; it runs without lora_kernels (install {package}=={series}.*)"
        )
    for place, expected in signatures.items():
        try:
            found = _found(place)
            got = None if expected is None else " ".join(inspect.signature(found).parameters)
        except (ImportError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
        if got != expected:
            return f"{package} {version}: {place} takes ({got}), expected ({expected}); it runs without lora_kernels"
    return None


def _found(place):
    module, _, names = place.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found
