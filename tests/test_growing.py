"""A run grows, moves and is opened again: what was measured stays, what is new is added, what cannot be is refused."""

import json
import shutil

import pytest
import torch

from quantdm import ActivationSpec, QuantDMError, Scheme, load_protocol, load_recipe
from quantdm.allocation.candidates import BASELINE
from quantdm.bank.weight_bank import WeightBank
from quantdm.files import load_tensors, read_json, write_json
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.subject import look_at
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.call import called
from quantdm.runs.engines.local import Engine
from quantdm.runs.final import final_jobs
from quantdm.runs.labelled import allowed
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import build_bank, load_space, measure_space
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import NEAR, RANDOM_SHARE, load_trials, run_trials
from tests.tiny_search import EFFORT, OPTIONS, TRIALS

NEW = Scheme.parse("uniform-channel-3")


class Counting(Engine):
    """An engine that remembers what it was asked for."""

    def __init__(self, run, subject):
        super().__init__(run, subject, workers=1)
        self.asked = []

    def map(self, method, arguments, *, at_most=None, until=None):
        def watched():
            for argument in arguments:
                call = called(method, argument)
                self.asked.append((call.method, call.argument))
                yield argument

        return super().map(method, watched(), at_most=at_most)

    def jobs(self, method):
        return [argument for name, argument in self.asked if name == method]


@pytest.fixture(scope="module")
def subject(dit):
    return look_at(dit)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished tiny run: at another place than where it was made."""
    return shutil.copytree(finished[0], tmp_path / "moved" / "run")


def again(folder, subject, **changes):
    """Start the tiny run again with some settings changed."""
    asked = {"target_bits": 3.2, "trials": TRIALS, "options": OPTIONS, "effort": EFFORT, **changes}
    return start_run(subject, folder, **asked)[0]


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def test_more_trials_are_added_to_those_that_are_there_and_again_measure_nothing(folder, subject):
    before = stamps(folder)
    run = again(folder, subject, trials=TRIALS + 4)
    with Counting(run, subject) as engine:
        choices, y = run_trials(run, engine, load_space(run))
        assert len(choices) == len(y) == TRIALS + 4
        assert len(engine.jobs("measure")) == 4
        run_trials(run, engine, load_space(run))
        assert len(engine.jobs("measure")) == 4
    assert {name: stamp for name, stamp in stamps(folder).items() if name in before} == before
    assert Run.open(folder).settings.trials == TRIALS + 4


def test_another_target_keeps_every_trial_and_measures_what_is_missing_near_it(folder, subject):
    run = again(folder, subject, target_bits=2.3)
    space = load_space(run)
    before = load_trials(run, space)[0]
    near = int((abs(space.avg_bits(before) - 2.3) <= NEAR).sum())
    with Counting(run, subject) as engine:
        choices, _ = run_trials(run, engine, space)
        fresh = len(engine.jobs("measure"))
    assert fresh == round(TRIALS * (1 - RANDOM_SHARE)) - near > 0
    assert {row.tobytes() for row in before} <= {row.tobytes() for row in choices}
    assert (abs(space.avg_bits(choices[len(before) :]) - 2.3) <= 2 * NEAR).all()


def test_fewer_and_more_options_keep_bank_sensitivities_and_trials_that_still_exist(folder, subject, tmp_path):
    old = load_space(Run.open(folder))
    files = {path: path.stat().st_mtime_ns for path in (folder / "bank").glob("*.safetensors")}
    fewer = again(folder, subject, options=OPTIONS[:-1])
    with Counting(fewer, subject) as engine:
        space = measure_space(fewer, engine, subject, build_bank(fewer, subject))
        assert not engine.asked
    assert {path: path.stat().st_mtime_ns for path in (folder / "bank").glob("*.safetensors")} == files
    assert (space.noise_error == old.noise_error[:, :-1]).all()
    whole = [t for t in TrialStore(folder / "trials") if OPTIONS[-1].label not in t["config"].values()]
    assert len(load_trials(fewer, space)[0]) == len(whole) < TRIALS

    more = again(folder, subject, options=(*OPTIONS, NEW))
    with Counting(more, subject) as engine:
        space = measure_space(more, engine, subject, build_bank(more, subject))
        assert {each.options for each in engine.jobs("propagate")} == {(NEW.label,)}
        assert not engine.jobs("sensitivity")
    assert (space.noise_error[:, :-1] == old.noise_error).all()
    assert len(load_trials(more, space)[0]) == TRIALS
    layer = subject.layers[3]
    apart = WeightBank(tmp_path / "apart", [layer], [NEW, OPTIONS[2]]).build(subject.weights)
    grown = WeightBank.open(folder / "bank", [layer], more.settings.bank_schemes)
    for scheme in (NEW, OPTIONS[2]):  # the company in which an option was quantized makes no difference
        assert torch.equal(
            grown.dense(layer.name, scheme, torch.float32), apart.dense(layer.name, scheme, torch.float32)
        )


def test_a_damaged_file_of_an_earlier_bank_is_not_taken_over(folder, subject):
    layer = subject.layers[0]
    path = folder / "bank" / read_json(folder / "bank" / "index.json")["layers"][layer.name]
    meta = load_tensors(path)[1]
    assert meta["of"]
    other = WeightBank(folder / "bank", [layer], [NEW])
    changed = {f"{layer.name}.weight": torch.randn(layer.shape)}
    from safetensors.torch import save_file

    save_file(changed, folder / "other.safetensors")
    built = other.build(folder / "other.safetensors")
    assert set(load_tensors(built._files[layer.name])[1]["errors"]) == {NEW.label}  # of another weight: nothing kept


def test_what_no_run_survives_is_refused_by_name_and_nothing_is_written(folder, subject):
    before = (folder / "run.json").read_text()
    with pytest.raises(QuantDMError, match="seed is 0, asked for 7") as error:
        again(folder, subject, seed=7, trials=50)
    assert "delete" not in str(error.value)
    steps = load_protocol("digits-dit").model_copy(update={"steps": 7})
    with pytest.raises(QuantDMError, match=r"protocol\.steps is 20, asked for 7"):
        again(folder, subject, protocol=steps)
    claims = Claims(folder / "trials" / CLAIMS)
    with claims:
        assert claims.take("somebody")
        again(folder, subject)  # the same settings: they share the work
        with pytest.raises(QuantDMError, match="works on it with other settings"):
            again(folder, subject, trials=50)
    assert (folder / "run.json").read_text() == before


def test_a_pipeline_and_pictures_that_were_moved_are_found_at_their_new_place(folder, subject, tmp_path, monkeypatch):
    record = json.loads((folder / "run.json").read_text())
    gone = {"model": "old/place", "location": str(tmp_path / "gone")}
    write_json(folder / "run.json", record | gone)
    subject.pipe.save_pretrained(tmp_path / "here" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    moved = look_at("mine")  # a relative path, opened from another working directory
    run = again("../moved/run", moved, protocol=load_protocol("digits-dit"))
    assert run.settings.location == str(tmp_path / "here" / "mine") == Run.open(folder).settings.location
    assert run.settings.model == "old/place"  # what it is called in its records
    assert run.open_subject().seen == subject.seen


def test_pictures_of_a_protocol_count_by_what_they_show_and_not_by_where_they_lie(folder, subject, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name / "p.png")
    protocols = [
        Protocol(**{**load_protocol("digits-dit").model_dump(), "version": 2, "call": {"picture": {"image": path}}})
        for path in (str(tmp_path / "a" / "p.png"), str(tmp_path / "b" / "p.png"))
    ]
    record = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", record | {"protocol": protocols[0].model_dump(mode="json")})
    settings = Run.open(folder).settings
    grown = Run.create(folder, settings.model_copy(update={"protocol": protocols[1]}))
    assert grown.settings.protocol == protocols[1] == Run.open(folder).settings.protocol
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "b" / "p.png")
    picture = {"image": str(tmp_path / "b" / "p.png")}
    other = Protocol(**{**load_protocol("digits-dit").model_dump(), "version": 2, "call": {"picture": picture}})
    with pytest.raises(QuantDMError, match=r"protocol\.call"):
        Run.create(folder, settings.model_copy(update={"protocol": other}))


def test_a_run_that_goes_on_counts_bytes_with_its_own_tables(subject, tmp_path):
    asked = {"target_bits": None, "target_bytes": 2_900_000, "trials": TRIALS, "options": OPTIONS, "effort": EFFORT}
    first, _ = start_run(subject, tmp_path / "run", **asked, embeddings=None)
    again, _ = start_run(subject, tmp_path / "run", **asked)  # the default tables are another size
    other, _ = start_run(subject, tmp_path / "other", **asked)
    assert again.settings == first.settings
    assert other.settings.target_bits > first.settings.target_bits + 1


def test_what_older_runs_had_not_is_not_in_their_records(finished):
    settings = Run.open(finished[0]).settings
    had_not = {"verify_draws": 2, "embeddings": None, "noise_steps": None}
    older = settings.model_copy(update=had_not).model_dump(mode="json")
    assert not had_not.keys() & older.keys()
    assert settings.model_copy(update={"noise_steps": 8}).model_dump()["noise_steps"] == 8
    assert settings.model_copy(update={"verify_draws": 3}).model_dump()["verify_draws"] == 3


def test_time_counts_only_what_was_measured():
    assert allowed(None, 160, 104, 0) == 160
    assert allowed(lambda done: 50, 160, 104, 0) == 154
    assert allowed(lambda done: done + 5, 160, 104, 20) == 129
    assert allowed(lambda done: 0, 160, 0, 0) == MIN_TRIALS
    assert allowed(lambda done: 0, 160, 104, 0) == 104


def test_the_best_uniform_scheme_is_one_that_ran_every_draw(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    run, recipe = Run.open(folder), load_recipe(folder / "recipe.yaml")
    spec, space = ActivationSpec(bits=8), load_space(run)
    note = final_jobs(run, space, recipe, spec, None)["uniform-next-width"][1]
    selection = read_json(folder / "selection.json")
    dropped = next(n for n in selection["candidates"] if n.startswith(BASELINE) and not n.endswith((note, "error")))
    selection["candidates"][BASELINE + note]["draws"] = 2
    selection["candidates"][dropped] |= {"fid_fp_mean": 0.0, "draws": 1}  # an easy draw, and then it was left out
    write_json(folder / "selection.json", selection)
    assert final_jobs(run, space, recipe, spec, None)["uniform-next-width"][1] == note
