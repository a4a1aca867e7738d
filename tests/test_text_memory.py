"""Text encoders remember their outputs by all they were given, and leave what others put on them."""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from quantdm import generate, load_pipeline, load_protocol
from quantdm.machine import seeded
from quantdm.pipelines.generate import devices_of
from quantdm.pipelines.text_memory import memoized_text_encoders

PROTOCOL = load_protocol("digits-sd")


class Counting(ModelHook):
    """A hook that counts and marks what comes out."""

    def __init__(self):
        self.calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return output


@pytest.fixture
def pipe():
    return load_pipeline("digits-sd")


def images_of(pipe):
    return generate(pipe, PROTOCOL, range(4), steps=2, batch_size=2)


def counted(pipe):
    """Count the calls that really reach the encoder's layers."""
    calls = []
    layer = next(m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_hook_of_accelerate_is_there_afterwards_and_works(pipe):
    plain = images_of(pipe)
    hook = Counting()
    add_hook_to_module(pipe.text_encoder, hook)
    put_on = vars(pipe.text_encoder)["forward"]
    calls = counted(pipe)
    with memoized_text_encoders(pipe):
        assert torch.equal(images_of(pipe), plain)
        assert torch.equal(images_of(pipe), plain)
    assert len(calls) == 2  # two batches, each once
    assert vars(pipe.text_encoder)["forward"] is put_on
    seen = hook.calls
    assert torch.equal(images_of(pipe), plain)
    assert hook.calls == seen + 2
    remove_hook_from_module(pipe.text_encoder)
    assert torch.equal(images_of(pipe), plain)


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),  # puts its hooks on anew after every call
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    ],
    ids=["model", "group"],
)
def test_an_offloaded_pipeline_remembers_and_stays_offloaded(pipe, offload):
    plain = images_of(pipe)
    offload(pipe)
    hooked = [name for name, module in pipe.text_encoder.named_modules() if hasattr(module, "_hf_hook")]
    calls = counted(pipe)
    with memoized_text_encoders(pipe):
        assert torch.equal(images_of(pipe), plain)
        assert torch.equal(images_of(pipe), plain)
    assert len(calls) == 2
    assert [name for name, module in pipe.text_encoder.named_modules() if hasattr(module, "_hf_hook")] == hooked
    assert torch.equal(images_of(pipe), plain)
    assert len(calls) == 4  # nothing is remembered any more


def test_an_encoder_whose_weights_are_brought_one_by_one_remembers(pipe):
    encoder, ids = pipe.text_encoder, torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        plain = encoder(ids)[0]
        accelerate.cpu_offload(encoder, torch.device("cpu"))
        put_on = vars(encoder)["forward"]
        calls = counted(pipe)
        with memoized_text_encoders(pipe):
            assert torch.equal(encoder(ids)[0], plain)
            assert torch.equal(encoder(ids)[0], plain)
        assert len(calls) == 1
        assert vars(encoder)["forward"] is put_on
        assert torch.equal(encoder(ids)[0], plain)
        assert len(calls) == 2


def test_a_hook_that_comes_or_goes_meanwhile_is_not_undone(pipe):
    plain, hook = images_of(pipe), Counting()
    with memoized_text_encoders(pipe):
        add_hook_to_module(pipe.text_encoder, hook)
        images_of(pipe)
    assert torch.equal(images_of(pipe), plain)
    assert hook.calls == 4
    with memoized_text_encoders(pipe):
        remove_hook_from_module(pipe.text_encoder)
    assert torch.equal(images_of(pipe), plain)
    assert hook.calls == 4


def test_everything_that_an_encoder_is_given_counts(pipe):
    encoder = pipe.text_encoder
    ids = torch.randint(0, encoder.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : encoder.config.max_position_embeddings]
    ids = ids.repeat(400, 1)  # printed, a mask of this size is shortened: equal words for different masks
    masks = [torch.ones_like(ids) for _ in range(2)]
    masks[1][200, : ids.shape[1] // 2] = 0
    with torch.no_grad():
        expected = [encoder(ids, attention_mask=mask)[0] for mask in masks]
        assert not torch.equal(*expected)
        with memoized_text_encoders(pipe):
            for mask, answer in zip(masks, expected, strict=True):
                assert torch.equal(encoder(ids, attention_mask=mask)[0], answer)
                assert torch.equal(encoder(input_ids=ids, attention_mask=mask)[0], answer)
            hidden = encoder(ids, attention_mask=masks[0], output_hidden_states=True).hidden_states
            assert hidden is not None
            remembered = encoder(ids, attention_mask=masks[0])
            remembered[0].zero_()  # what a pipeline does to its copy is its own affair
            assert torch.equal(encoder(ids, attention_mask=masks[0])[0], expected[0])


def test_only_the_generators_of_the_pipelines_own_devices_are_seeded_and_all_come_back(pipe):
    assert devices_of(pipe) == {torch.device("cpu")}
    before = torch.random.get_rng_state()
    waiting = list(torch.cuda._lazy_seed_tracker.get_calls())  # what CUDA will do when it starts
    started = torch.cuda.is_initialized()  # by another test
    others = torch.cuda.get_rng_state_all() if started else []
    images_of(pipe)
    with seeded(5, devices_of(pipe)):
        one = torch.rand(3)
    with seeded(5):
        assert torch.equal(torch.rand(3), one)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.cuda._lazy_seed_tracker.get_calls() == waiting
    assert torch.cuda.is_initialized() == started
    assert all(map(torch.equal, torch.cuda.get_rng_state_all() if started else [], others))
    with pytest.raises(RuntimeError), seeded(1):
        raise RuntimeError
    assert torch.equal(torch.random.get_rng_state(), before)
