"""Videos: distances that see order and motion, figures frame by frame, a real tiny pipeline to a folder and back."""

import pytest
import torch

from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.metrics.distance import frechet_distance, psnr_of_bytes
from quantdm.metrics.features import load_extractor, open_features
from quantdm.metrics.images import open_images
from quantdm.metrics.manifest import MANIFEST
from quantdm.metrics.measure import measure
from quantdm.metrics.sampled import sampled_images
from quantdm.metrics.samples import Draw, compare, draw_samples
from quantdm.metrics.to_folder import generate_to_folder
from quantdm.metrics.videos import by_frame, clip_features, flicker, frechet_of_clips, video_distance
from tests.pipeline_kinds import make

N, F, D = 200, 6, 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Statistics of tests stay in their folder."""
    monkeypatch.setenv("QUANTDM_CACHE", str(tmp_path / "cache"))


def walks(seed: int = 0) -> torch.Tensor:
    """Features of frames that walk at random, [N, F, D]."""
    return torch.randn(N, F, D, generator=torch.Generator().manual_seed(seed)).cumsum(1)


def test_frames_in_another_order_are_the_same_frames_and_another_video() -> None:
    clips = walks()
    mixed = clips[:, [0, 3, 1, 5, 2, 4]]
    assert frechet_distance(clips.flatten(0, 1), mixed.flatten(0, 1)) == pytest.approx(0, abs=1e-9)
    assert frechet_of_clips(clips.flatten(0, 1), clips.flatten(0, 1), F) == pytest.approx(0, abs=1e-9)
    assert frechet_of_clips(clips.flatten(0, 1), mixed.flatten(0, 1), F) > 0.1


def test_what_is_known_of_a_video_is_its_mean_and_its_motion() -> None:
    start, speed = torch.randn(N, 1, D), torch.rand(N, 1, D)
    found = clip_features((start + speed * torch.arange(F)[None, :, None]).flatten(0, 1), F)
    torch.testing.assert_close(
        found, torch.cat([start + speed * (F - 1) / 2, speed], 2)[:, 0].double(), atol=1e-5, rtol=0
    )
    for features, frames in ((torch.zeros(7, D), 2), (torch.zeros(6, D), 1)):
        with pytest.raises(QuantDMError, match="whole videos of two frames or more"):
            clip_features(features, frames)


def test_few_videos_of_wide_features_have_the_distance_of_the_whole_matrices() -> None:
    a, b = torch.randn(2, 5 * F, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = frechet_distance(clip_features(a, F), clip_features(b, F))
    assert frechet_of_clips(a, b, F) == pytest.approx(whole, rel=1e-6)


def test_given_features_make_the_distance() -> None:
    a, b = (torch.rand(24, F, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = video_distance(a, b, lambda v: v.mean((1, 3, 4)), at_once=5)
    assert found == pytest.approx(frechet_distance(a.mean((1, 3, 4)), b.mean((1, 3, 4))), rel=1e-5)
    with pytest.raises(QuantDMError, match=r"features are \(24, 3, 4, 4\), expected \[24, D\]"):
        video_distance(a, b, lambda v: v.mean(1))


def test_a_video_that_drifts_away_says_so_at_its_last_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.randint(60, 190, (8, 1, 3, 16, 16), generator=generator, dtype=torch.uint8).expand(-1, F, -1, -1, -1)
    noise = torch.randn(8, F, 3, 16, 16, generator=generator) * (1 + torch.arange(F))[None, :, None, None, None]
    drifting = (still + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    whole = still.flatten(0, 1)
    found = by_frame(drifting, whole, F)
    assert found == sorted(found, reverse=True)
    assert min(found) < psnr_of_bytes(drifting, whole) < max(found)
    assert flicker(whole, F) == 0 < flicker(drifting, F)


def test_a_video_pipeline_is_measured_and_its_folder_is_read_frame_by_frame(tmp_path) -> None:
    pipe, protocol = make("video")
    draw, pyramid = Draw(0, 3, 2), load_extractor("pyramid")
    samples = draw_samples(pipe, protocol, pyramid, draw)
    figures = compare(samples, samples)
    assert samples.frames == 3
    assert (figures["fvd_fp"], figures["psnr_last_fp"], figures["flicker_fp"]) == (pytest.approx(0, abs=1e-6), None, 1)
    generate_to_folder(pipe, protocol, draw.seeds, tmp_path / "made", steps=2)
    made, live = open_images(tmp_path / "made"), sampled_images(pipe, protocol, draw, name="live")
    assert (made.frames, len(made), len(live)) == (3, 9, 9)
    assert torch.equal(torch.cat([*made.batches()]), samples.images)
    space = open_features("pyramid")
    fvd, psnr = measure(made, space, ["fvd", "psnr"], reference=live, pairs=live)
    assert (fvd.value, psnr.value) == (pytest.approx(0, abs=1e-6), 100)
    assert "3 videos of 3 frames" in fvd.notes[0]
    with pytest.raises(QuantDMError, match="fvd: needs videos of as many frames on both sides"):
        measure(made, space, ["fvd"], reference=open_images(stills(tmp_path / "stills", samples.images)))


def test_a_folder_of_videos_that_does_not_say_their_frames_is_told_by_one_of_them(tmp_path) -> None:
    pipe, protocol = make("video")
    folder, seeds = tmp_path / "made", Draw(0, 2, 2).seeds
    generate_to_folder(pipe, protocol, seeds, folder, steps=2)
    record, before = read_json(folder / MANIFEST), (folder / "000000.png").read_bytes()
    write_json(folder / MANIFEST, {key: value for key, value in record.items() if key != "frames"})  # as before 0.4
    with pytest.raises(QuantDMError, match=r"does not say of how many frames.*evaluate generate` again"):
        open_images(folder)
    assert generate_to_folder(pipe, protocol, seeds, folder, steps=2) == 1
    assert read_json(folder / MANIFEST) == record
    assert (folder / "000000.png").read_bytes() == before
    assert generate_to_folder(pipe, protocol, seeds, folder, steps=2) == 0
    assert open_images(folder).frames == 3


def stills(folder, images):
    """Write frames as pictures of their own."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder
