"""What diffusers exports under a name, as far as it can deliver it."""

from typing import Any

import diffusers


def exported(name: str) -> Any:
    """Return what diffusers exports under a name; None: there is no such name, or it cannot be imported here.

    diffusers lists names without importing them: some of classes that are gone (where onnxruntime is installed), some
    that need another transformers than the installed one.
    """
    try:
        return getattr(diffusers, name, None)
    except RuntimeError:  # what it makes of whatever an import raises
        return None
