"""Images from folders, archives and arrays; figures of them carry their protocol; bad input names the file."""

import io
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from quantdm.errors import QuantDMError
from quantdm.metrics.feature_sets import FeatureSet, feature_set, is_statistics, merged
from quantdm.metrics.features import default_features, load_extractor, open_features
from quantdm.metrics.images import open_images
from quantdm.metrics.inception import InceptionV3
from quantdm.metrics.lpips import Lpips
from quantdm.metrics.measure import measure, set_figures
from quantdm.metrics.one_by_one import values_of_each
from quantdm.metrics.paired import psnr_each, ssim_each
from quantdm.metrics.registry import METRICS, check_metrics
from quantdm.metrics.towers import resized
from quantdm.pipelines.embedded.digits import load_digit_images

IMAGES = (255 * load_digit_images("test")[0][:80]).round().to(torch.uint8)
DIGITS = open_features("digits")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Statistics of tests stay in their folder, and weights of the machine do not matter."""
    monkeypatch.setenv("QUANTDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def png(image):
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


def write_folder(folder, images=IMAGES):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / f"{i:03d}.png").write_bytes(png(image))
    return folder


def in_zip(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for picture in folder.iterdir():
            file.write(picture, f"some/{picture.name}")
    return path


def in_tar(folder, path):
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, "some")
    return path


def all_of(source, **how):
    return torch.cat(list(open_images(source, **how).batches()))


def test_folders_archives_arrays_and_tensors_hold_the_same_images(tmp_path):
    folder = write_folder(tmp_path / "a")
    np.savez(tmp_path / "a.npz", IMAGES.permute(0, 2, 3, 1).numpy())
    save_file({"images": IMAGES}, tmp_path / "a.safetensors")
    sources = [folder, in_zip(folder, tmp_path / "a.zip"), in_tar(folder, tmp_path / "a.tar.gz")]
    for source in [*sources, tmp_path / "a.npz", tmp_path / "a.safetensors"]:
        assert torch.equal(all_of(source), IMAGES), source
        assert len(open_images(source)) == 80


def test_a_digest_follows_the_content(tmp_path):
    folder = write_folder(tmp_path / "a")
    before = open_images(folder).digest()
    assert open_images(folder).digest() == before
    (folder / "003.png").write_bytes(png(IMAGES[4]))
    assert open_images(folder).digest() != before


# ----------------------------------------------------------------------------------------------------------- bad input


def spoil(folder, kind):
    """Write a folder with something wrong in it."""
    write_folder(folder, IMAGES[:6])
    bad = folder / "004.png"
    picture = Image.fromarray(IMAGES[4].permute(1, 2, 0).numpy())
    if kind == "corrupt":
        bad.write_bytes(bad.read_bytes()[:200])
    elif kind == "no picture":
        bad.write_bytes(b"hello")
    elif kind == "size":
        picture.resize((40, 32)).save(bad)
    else:
        picture.convert(kind).save(bad)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("corrupt", "004.png: cannot be read as a picture .*replace it or take it away"),
        ("no picture", "004.png: cannot be read as a picture"),
        ("size", "004.png: is 40 x 32, but 000.png 32 x 32; expected one size: --side 256"),
        ("L", "004.png: has mode L, expected RGB as 000.png; --rgb"),
        ("RGBA", "004.png: has mode RGBA, expected RGB as 000.png; --rgb"),
        ("P", "004.png: has mode P, expected RGB as 000.png; --rgb"),
    ],
)
@pytest.mark.parametrize("pack", [None, in_zip, in_tar], ids=["folder", "zip", "tar"])
def test_a_bad_picture_is_one_error_that_names_the_file(tmp_path, kind, message, pack):
    folder = spoil(tmp_path / "a", kind)
    source = folder if pack is None else pack(folder, tmp_path / ("a.zip" if pack is in_zip else "a.tar.gz"))
    with pytest.raises(QuantDMError, match=message) as caught:
        all_of(source)
    assert len(str(caught.value).splitlines()) == 1


def test_mixed_sizes_and_modes_can_be_asked_for(tmp_path):
    assert all_of(spoil(tmp_path / "a", "size"), side=24).shape == (6, 3, 24, 24)
    assert all_of(spoil(tmp_path / "b", "P"), rgb=True).shape == (6, 3, 32, 32)
    assert open_images(tmp_path / "a", side=24).resized == "scaled and cropped to 24 px by PIL, bicubic"


def test_too_few_and_missing_images_are_one_error(tmp_path):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "one", IMAGES[:1])
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    (tmp_path / "b.npz").write_bytes(b"no npz")
    (tmp_path / "c.txt").write_text("")
    np.savez(tmp_path / "d.npz", np.zeros((4, 8, 8, 3), np.float32))
    np.savez(tmp_path / "e.npz", a=np.zeros(3), b=np.zeros(3))
    save_file({"x": torch.zeros(3)}, tmp_path / "f.safetensors")
    for name, message in {
        "empty": "empty: holds no picture, expected files that end in .png", "one": "one: holds 1 image, expected two",
        "a.zip": "a.zip: damaged or no such archive", "b.npz": "b.npz: damaged or no .npz",
        "c.txt": "c.txt: expected a folder, .zip", "nowhere": "nowhere: no such file or folder",
        "d.npz": r"d.npz: got torch.float32 \(4, 3, 8, 8\), expected bytes", "e.npz": "e.npz: holds a, b; expected one",
        "f.safetensors": "f.safetensors: holds x; expected a tensor `images`",
    }.items():  # fmt: skip
        with pytest.raises(QuantDMError, match=message):
            open_images(tmp_path / name)


# ------------------------------------------------------------------------------------------------- statistics on disk


def test_statistics_survive_the_disk_merge_and_refuse_others(tmp_path):
    whole = feature_set(open_images(write_folder(tmp_path / "a")), DIGITS)
    halves = [write_folder(tmp_path / f"{i}", IMAGES[40 * i : 40 * i + 40]) for i in (0, 1)]
    both = merged(feature_set(open_images(half), DIGITS) for half in halves)
    torch.testing.assert_close(both.moments.outer, whole.moments.outer)
    both.save(tmp_path / "s.safetensors")
    again = FeatureSet.load(tmp_path / "s.safetensors")
    assert is_statistics(tmp_path / "s.safetensors")
    assert (again.moments.n, again.distance, again.moments.ruler) == (80, "FD-digits", whole.moments.ruler)
    assert torch.equal(again.features, both.features)
    other = feature_set(open_images(tmp_path / "a"), open_features("pyramid"))
    with pytest.raises(QuantDMError, match=r"a: are of FD-pyramid, weights .*, but .*s.safetensors of FD-digits"):
        again + other


def test_statistics_of_pictures_of_another_size_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a", IMAGES[:8])
    pyramid = open_features("pyramid")
    raw, same, larger = (feature_set(open_images(folder, side=side), pyramid) for side in (None, 32, 40))
    with pytest.raises(QuantDMError, match=r"a: is of pictures scaled and cropped to 40 px .* cropped to 32 px"):
        set_figures(["fd"], same, larger)
    for other in (raw, same):
        assert set_figures(["fd"], same, other)["fd"].value >= 0


def test_the_cache_is_found_by_content_and_not_by_name(tmp_path):
    def counted(images):
        seen.append(len(images))
        return DIGITS.extract(images)

    seen = []
    space = type(DIGITS)(DIGITS.name, DIGITS.kind, "counted", counted)
    one = feature_set(open_images(write_folder(tmp_path / "a")), space)
    (tmp_path / "a").rename(tmp_path / "b")
    two = feature_set(open_images(tmp_path / "b"), space)
    assert seen == [64, 16]
    assert torch.equal(one.moments.outer, two.moments.outer)
    feature_set(open_images(tmp_path / "b"), space, cached=False)
    assert len(seen) == 4


def test_published_statistics_are_read_and_their_silence_is_told(tmp_path):
    mine = feature_set(open_images(write_folder(tmp_path / "a")), DIGITS)
    np.savez(tmp_path / "r.npz", mu=mine.moments.mean.numpy(), sigma=mine.moments.covariance.numpy())
    assert is_statistics(tmp_path / "r.npz")
    found = measure(open_images(tmp_path / "a"), DIGITS, ["fd"], reference=FeatureSet.load(tmp_path / "r.npz"))
    assert found[0].value == pytest.approx(0, abs=1e-6)
    assert "does not say its features" in found[0].notes[-1]


# -------------------------------------------------------------------------------------------------------------- figures


def test_figures_carry_their_protocol_and_few_images_bring_kid(tmp_path):
    a, b = (open_images(write_folder(tmp_path / n, i)) for n, i in (("a", IMAGES[:40]), ("b", IMAGES[40:])))
    fd, kid = measure(a, DIGITS, ["fd"], reference=b)
    assert fd.title == "FD-digits"
    assert fd.protocol.startswith(
        "40 images against 40, unknown steps, seeds unknown, 64 features, resize: none, 32 px"
    )
    assert "biased upwards: of fewer than 2,048 images; 40 images give 64 features a singular covariance" in fd.notes[0]
    assert (kid.metric, kid.title) == ("kid", "KID on digits")
    assert str(fd).startswith("FD-digits: ")
    assert kid.record()["better"] == "lower"


def test_pairs_have_closed_forms_and_must_match(tmp_path):
    half = torch.full((3, 3, 32, 32), 0.5)
    torch.testing.assert_close(psnr_each(half + 0.1, half), torch.full((3,), 20.0).double(), atol=1e-4, rtol=0)
    assert psnr_each(half, half).tolist() == [100.0] * 3
    x = IMAGES[:3].float() / 255
    assert ssim_each(x, x).tolist() == pytest.approx([1.0] * 3)
    assert (ssim_each(x, 1 - x) < 0.2).all()
    a, b = (open_images(write_folder(tmp_path / n, IMAGES[:k])) for n, k in (("a", 20), ("b", 19)))
    with pytest.raises(QuantDMError, match=r"a: has 20 images, but .*b 19; pairs must match"):
        measure(a, DIGITS, ["psnr"], pairs=b)
    (tmp_path / "a" / "019.png").rename(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "000.png").unlink()
    with pytest.raises(QuantDMError, match="a: 001 has no partner in"):
        measure(open_images(tmp_path / "a"), DIGITS, ["psnr"], pairs=b)
    same = measure(b, DIGITS, ["psnr", "cosine", "inception_score"], pairs=b)
    assert (same[0].value, same[0].notes) == (100.0, ("19 pairs are equal and count as 100 dB",))
    assert same[1].value == pytest.approx(1)
    assert 1 < same[2].value < 10


def test_preferences_are_asked_of_their_packages_image_by_image(tmp_path, monkeypatch):
    images, asked = open_images(write_folder(tmp_path / "a", IMAGES[:3])), []

    def score(picture, prompt):
        asked.append((picture.mode, picture.size, prompt))
        return float(len(prompt))

    reward = SimpleNamespace(load=lambda name: SimpleNamespace(score=lambda prompt, picture: score(picture, prompt)))
    hps = SimpleNamespace(score=lambda picture, prompt, hps_version: [score(picture, prompt)])
    monkeypatch.setattr("quantdm.metrics.registry.find_spec", lambda name: object())
    for name, module, package in (("image_reward", "ImageReward", reward), ("hps_v2", "hpsv2", hps)):
        monkeypatch.setitem(sys.modules, module, package)
        with pytest.raises(QuantDMError, match=f"{name}: needs one prompt per image"):
            measure(images, DIGITS, [name])
        assert measure(images, DIGITS, [name], prompts=["a", "bb", "ccc"])[0].value == 2
        assert asked[-1] == ("RGB", tuple(IMAGES.shape[:1:-1]), "ccc")
    hps.score = reward.load = lambda *_, **__: 1 / 0
    for name, what in (("image_reward", "load its model"), ("hps_v2", "score an image")):
        with pytest.raises(QuantDMError, match=f"{name}: its package cannot {what}: ZeroDivisionError"):
            measure(images, DIGITS, [name], prompts=["a", "bb", "ccc"])


def test_what_is_missing_is_named_with_the_command_that_fetches_it(tmp_path):
    images = open_images(write_folder(tmp_path / "a", IMAGES[:9]))
    for name, message in {
        "lpips": "no weights of AlexNet; to get them: download alexnet-owt", "hps_v2": "to get it: pip install hpsv2",
        "image_reward": "to get it: pip install image-reward", "clip_score": "needs a CLIP model",
        "kid": "needs other images", "psnr": "needs the images of equal seeds", "fdd": "nearest: fd",
        "cmmd": "needs other images",
    }.items():  # fmt: skip
        with pytest.raises(QuantDMError, match=message):
            measure(images, DIGITS, [name])
    with pytest.raises(QuantDMError, match=r"no weights for 'inception-clean'; to get them: download pt_inception"):
        load_extractor("inception-clean")
    with pytest.raises(QuantDMError, match=r"no weights for 'dinov2:.*huggingface-cli download facebook/dinov2"):
        load_extractor("dinov2:nobody/nothing")
    assert default_features() in ("efficientnet-lite0", "pyramid")
    for known in METRICS.values():
        assert known.says
        assert known.better in ("lower", "higher")
    check_metrics(("fd", "kid"), {"set", "features kept"})


# -------------------------------------------------------------------------------------------- networks of others


def seeded_inception(path):
    """Inception with weights drawn in the order of their names; pytorch-fid's layout."""
    g = torch.Generator().manual_seed(0)
    state = InceptionV3().state_dict()
    for key in sorted(state):
        value = state[key]
        if not value.is_floating_point():
            continue
        if key.endswith(("running_var", "bn.weight")):
            state[key] = torch.rand(value.shape, generator=g) + 0.5
        elif value.ndim == 4:
            state[key] = torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5
        else:
            state[key] = torch.randn(value.shape, generator=g) * 0.05
    torch.save(state, path)
    return path


def test_inception_is_the_network_of_torch_fidelity(tmp_path):
    """The numbers are what torch-fidelity 0.4.0 answers with these weights; ours were equal in every bit."""
    path = seeded_inception(tmp_path / "weights.pth")
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = {
        name: load_extractor(f"inception-{name}:{path}")(images.float() / 255)
        for name in ("torchmetrics", "clean", "pytorch-fid")
    }
    for name in ("torchmetrics", "clean"):
        found = features[name]
        assert found[0, :4].tolist() == pytest.approx([3.53132, 0.0, 0.05692, 2.22573], abs=2e-3)
        assert (found.mean().item(), found.std().item()) == pytest.approx((2.787646, 3.918541), abs=1e-3)
    gap = (features["pytorch-fid"] - features["clean"]).abs().max()  # it scales by 2 where the others have 255 / 128
    assert 0.01 < gap < 0.5
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(QuantDMError, match=r"holds no Inception weights of 2015-12-05 .*Conv2d_1a_3x3"):
        load_extractor(f"inception-clean:{tmp_path / 'other.pth'}")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [24, 77])
def test_resizing_is_that_of_pil_in_floats(mode, side):
    filter_ = Image.Resampling[mode.upper()]
    image = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(3))
    ours = resized(side, mode, clamp=False)(image)
    channels = [Image.fromarray(c.numpy(), mode=None).resize((side, side), filter_) for c in image[0]]
    torch.testing.assert_close(
        ours[0], torch.stack([torch.from_numpy(np.array(c)) for c in channels]), atol=1e-5, rtol=0
    )


def test_transformers_models_are_features_from_a_directory(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "projection_dim": 8}  # fmt: skip
    Dinov2Model(Dinov2Config(**{k: v for k, v in vision.items() if k != "projection_dim"})).save_pretrained(
        tmp_path / "dino"
    )
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 12}  # fmt: skip
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(tmp_path / "clip")
    images = IMAGES.float() / 255
    assert load_extractor(f"dinov2:{tmp_path / 'dino'}")(images[:3]).shape == (3, 16)
    clip = open_features(f"clip:{tmp_path / 'clip'}")
    assert clip.extract(images[:3, :1]).shape == (3, 8)
    with pytest.raises(QuantDMError, match="is a dinov2 model, expected one of clip"):
        load_extractor(f"clip:{tmp_path / 'dino'}")
    a, b = (open_images(write_folder(tmp_path / n, i)) for n, i in (("a", IMAGES[:40]), ("b", IMAGES[40:])))
    found = measure(a, clip, ["cmmd", "precision"], reference=b)
    assert found[0].value > 0
    assert measure(a, clip, ["cmmd"], reference=a)[0].value == pytest.approx(0, abs=1e-6)


def test_clip_score_of_a_model_with_its_tokenizer(tmp_path, sd):
    torch.manual_seed(0)
    words = len(sd.tokenizer)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": words, "max_position_embeddings": 12, "eos_token_id": words - 1}  # fmt: skip
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(tmp_path / "clip")
    sd.tokenizer.save_pretrained(tmp_path / "clip")
    images = open_images(write_folder(tmp_path / "a", IMAGES[:6]))
    prompts = ["a handwritten one", "a handwritten two"] * 3
    found = measure(images, DIGITS, ["clip_score"], prompts=prompts, clip=str(tmp_path / "clip"))[0]
    assert 0 <= found.value <= 100
    each = values_of_each(["clip_score"], images, DIGITS, prompts=prompts, clip=str(tmp_path / "clip"))["clip_score"]
    assert each.shape == (6,)
    with pytest.raises(QuantDMError, match="prompts: got 5, expected 6: one per image of"):
        measure(images, DIGITS, ["clip_score"], prompts=prompts[:5], clip=str(tmp_path / "clip"))


def test_lpips_is_zero_on_itself_and_grows_with_the_change(tmp_path):
    g = torch.Generator().manual_seed(0)
    sizes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    state = {}
    for i, size in sizes.items():
        state[f"features.{i}.weight"] = torch.randn(size, generator=g) * (2 / (size[1] * size[2] ** 2)) ** 0.5
        state[f"features.{i}.bias"] = torch.zeros(size[0])
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    distance, x = Lpips(tmp_path / "alexnet.pth"), torch.rand(4, 3, 64, 64, generator=g)
    noise = torch.randn(x.shape, generator=g)
    found = [distance(x, (x + a * noise).clamp(0, 1)).mean().item() for a in (0, 0.05, 0.2)]
    assert found[0] == 0
    assert 0 < found[1] < found[2]


def test_measuring_pictures_on_disk_waits_for_no_diffusers(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(IMAGES[:12]):
            (tmp_path / name / f"{i}.png").write_bytes(png(image))
    code = f"""
import sys
from quantdm.cli.main import main
sys.argv = ["quantdm", "evaluate", "fid", "calc", {str(tmp_path / "mine")!r}, "--ref", {str(tmp_path / "theirs")!r}]
sys.argv += ["--features", "pyramid"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print({{"diffusers", "transformers", "accelerate"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FD-pyramid: 0.0" in done.stdout
    assert done.stdout.rstrip().endswith("set()")
