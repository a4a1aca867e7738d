"""The manifest in a folder of generated images, for those who only read it: nothing heavy is imported for pictures."""

from typing import Any

MANIFEST = "manifest.json"
VERSION = 1


def lacks_frames(manifest: dict[str, Any]) -> bool:
    """Tell whether a folder is of videos and does not say of how many frames, as none did before 0.4."""
    if "frames" in manifest or manifest.get("latents"):
        return False
    from quantdm.pipelines.signature import makes_videos  # imports diffusers

    return makes_videos(str(manifest.get("pipeline")))
