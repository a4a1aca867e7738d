"""Videos: what frames look like and how they change, as one distance; figures frame by frame."""

from collections.abc import Callable

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.distance import frechet_distance, psnr_of_bytes
from quantdm.pipelines.protocol import Protocol


def are_videos(made: torch.Tensor, protocol: Protocol) -> bool:
    """Tell whether what a pipeline made [N, ...] are videos [N, F, C, H, W]; latents of video models look like them."""
    return made.ndim == 5 and protocol.output != "latent"


def clip_features(features: torch.Tensor, frames: int) -> torch.Tensor:
    """Return what is known of every video from features of its frames: their mean, and how far neighbours are apart.

    Args:
        features: of frames, video after video, [N * frames, F].
        frames: of each video, two or more.

    Returns:
        [N, 2 F]: means over frames, and root mean squares of the differences of neighbouring frames. A distance of
        the first half sees looks, of the second motion and flicker; the order of frames counts in it.

    Raises:
        QuantDMError: one frame per video, or features that are no whole videos.
    """
    if frames < 2 or len(features) % frames:
        raise QuantDMError(
            f"videos: got {len(features)} frames, {frames} in each; expected whole videos of two frames or more"
        )
    clips = features.double().view(-1, frames, features.shape[1])
    return torch.cat([clips.mean(1), clips.diff(dim=1).square().mean(1).sqrt()], dim=1)


def frechet_of_clips(features_a: torch.Tensor, features_b: torch.Tensor, frames: int) -> float:
    """Return a distance of videos like FVD (Unterthiner et al. 2018), from features of frames instead of I3D's.

    Figures of other features, or of the published FVD, are not comparable with it.

    Raises:
        QuantDMError: see `clip_features`; fewer than two videos.
    """
    a, b = clip_features(features_a, frames), clip_features(features_b, frames)
    if len(a) + len(b) < a.shape[1]:  # in the span of all rows nothing changes, and the matrices are small
        mean = a.mean(dim=0)
        basis = torch.linalg.qr(torch.cat([a - mean, b - mean]).T).Q
        a, b = (a - mean) @ basis, (b - mean) @ basis
    return frechet_distance(a, b)


def video_distance(
    videos_a: torch.Tensor, videos_b: torch.Tensor, extract: Callable[[torch.Tensor], torch.Tensor], *, at_once: int = 8
) -> float:
    """Return the Frechet distance of two sets of videos by given features: FVD where `extract` is its I3D.

    Args:
        videos_a: [N, F, C, H, W], bytes or numbers in [0, 1].
        videos_b: [M, F, C, H, W].
        extract: from videos [n, F, C, H, W] in [0, 1] to features [n, D].
        at_once: videos that are extracted at a time.

    Raises:
        QuantDMError: no videos, or features that are no rows.
    """
    found = []
    for videos in (videos_a, videos_b):
        if videos.ndim != 5:
            raise QuantDMError(f"videos: got {tuple(videos.shape)}, expected [N, F, C, H, W]")
        parts = [extract(v.float() / 255 if v.dtype == torch.uint8 else v) for v in videos.split(at_once)]
        features = torch.cat(parts)
        if features.ndim != 2 or len(features) != len(videos):
            raise QuantDMError(f"videos: features are {tuple(features.shape)}, expected [{len(videos)}, D]")
        found.append(features)
    return frechet_distance(*found)


def by_frame(images: torch.Tensor, reference: torch.Tensor, frames: int) -> list[float]:
    """Return the PSNR in dB to the paired video at every frame: whether a video drifts away from full precision.

    Args:
        images: frames as bytes, video after video, [N * frames, C, H, W].
        reference: of equal noises.
        frames: of each video.
    """
    return [psnr_of_bytes(images[i::frames], reference[i::frames]) for i in range(frames)]


def flicker(images: torch.Tensor, frames: int) -> float:
    """Return the mean change of a pixel from frame to frame, in [0, 1]; frames as bytes, video after video."""
    clips = images.view(-1, frames, *images.shape[1:]).float() / 255
    return sum(clip.diff(dim=0).abs().mean().item() for clip in clips) / len(clips)
