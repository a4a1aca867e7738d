"""Names that diffusers lists and cannot deliver: nobody who asks for a class, or for all of them, is brought down."""

import json
import sys
from types import ModuleType

import diffusers
import pytest

from quantdm import QuantDMError
from quantdm.hub.card_snippet import signature_of
from quantdm.pipelines.exported import exported
from quantdm.pipelines.signature import makes_videos
from quantdm.pipelines.skeleton import open_skeleton
from tests.test_denoiser_classes import MATRIX

GONE, BROKEN = "GoneModel", "BrokenModel"


@pytest.fixture
def listed(monkeypatch):
    """diffusers lists a name that its module has not, and one whose module cannot be imported."""
    monkeypatch.setitem(sys.modules, "diffusers.gone", ModuleType("diffusers.gone"))
    for name, module in ((GONE, "gone"), (BROKEN, "broken")):
        monkeypatch.setitem(diffusers._class_to_module, name, module)
        diffusers.__all__.append(name)
    yield
    for name in (GONE, BROKEN):
        diffusers.__all__.remove(name)


def test_a_name_that_cannot_be_delivered_is_no_class(listed, tmp_path):
    assert {GONE, BROKEN} <= set(dir(diffusers))
    with pytest.raises(AttributeError, match=GONE):
        getattr(diffusers, GONE)
    with pytest.raises(RuntimeError, match="broken"):
        getattr(diffusers, BROKEN)
    for name in (GONE, BROKEN, "NobodysModel"):
        assert exported(name) is None
        assert not makes_videos(name)
        assert signature_of({"_class_name": name}) is None
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(QuantDMError, match=f"its denoiser is a {name}, which diffusers .* cannot import"):
            open_skeleton(tmp_path / "config.json")
    assert exported("UNet2DModel") is diffusers.UNet2DModel


def test_a_walk_over_all_classes_passes_them(listed):
    found = MATRIX.denoiser_classes()
    assert "UNet2DConditionModel" in found
    assert not {GONE, BROKEN} & set(found)
