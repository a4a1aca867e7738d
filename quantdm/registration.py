"""Let diffusers and transformers know quantdm, when they are imported and not before: to import them takes seconds."""

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "quantdm"
BEFORE = "_quantdm_before"  # attribute of a function that holds the place of another: that other
_HUB = "quantdm.hub"  # importing it registers what stands behind the doors


class _Table(dict[str, Any]):
    """A table of another library in which quantdm stands; its classes are imported when somebody asks for them."""

    def __getitem__(self, method: str) -> Any:
        if method == METHOD:
            importlib.import_module(_HUB)  # which puts the classes in here
        return super().__getitem__(method)


def _quantizers(module: Any) -> None:
    """Stand in both tables before anybody reads them."""
    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        setattr(module, name, _Table({**getattr(module, name), METHOD: None}))


def _schedulers(module: Any) -> None:
    """Register before the first scheduler is opened."""
    mixin, plain = module.SchedulerMixin, module.SchedulerMixin.from_pretrained.__func__

    @functools.wraps(plain)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        importlib.import_module(_HUB).register()  # puts what opens corrected schedulers into the place of this
        return vars(mixin)["from_pretrained"].__get__(None, cls)(*args, **kwargs)

    setattr(from_pretrained, BEFORE, plain)
    mixin.from_pretrained = classmethod(from_pretrained)


# Module of another library -> what is done when it has been imported.
_DOORS: dict[str, Callable[[Any], None]] = {
    "diffusers.quantizers.auto": _quantizers,
    "transformers.quantizers.auto": _quantizers,
    "diffusers.schedulers.scheduling_utils": _schedulers,
}


class _Watch(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a door, and opens it once the module has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a door as the other finders have it."""
        if fullname not in _DOORS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _DOORS[fullname](module)

            spec.loader.exec_module = exec_module  # the loader stays what it is: others ask it for its source
        return spec


def register_when_imported() -> None:
    """Make quantdm known to diffusers and transformers: now where they are imported, else when they are."""
    if any(name in sys.modules for name in _DOORS):
        importlib.import_module(_HUB)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
