"""What is mistyped is answered at once: before torch and diffusers, which take seconds, are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TYPOS = {
    "a pipeline": (["run", "nosuch", "--target-bits", "3"], "nosuch"),
    "a file of a pipeline": (["inspect", "nosuch.safetensors"], "nosuch.safetensors"),
    "a recipe to look at": (["inspect", "nosuch.yaml"], "recipe: no file nosuch.yaml"),
    "a scheme": (["search", "digits-dit", "--run-dir", "run", "--options", "kmeans-chanel-4"], "kmeans-chanel-4"),
    "a protocol": (["evaluate", "digits-dit", "--protocol", "nosuch"], "nosuch"),
    "a recipe": (["apply", "digits-dit", "--recipe", "nosuch.yaml", "-o", "out"], "nosuch.yaml"),
    "a run": (["select", "--run-dir", "nosuch", "--target-bits", "3", "-o", "out.yaml"], "nosuch"),
    "one of two runs": (["report", "nosuch", "other"], "nosuch"),
}
CODE = """
import json, sys
from typer.testing import CliRunner
from quantdm.cli.main import app
for words in json.loads(sys.argv[1]):
    error = CliRunner().invoke(app, words).exception
    print(type(error).__name__, error)
print({"torch", "diffusers", "transformers"} & set(sys.modules))
"""


def test_a_typo_is_answered_before_anything_heavy_is_imported(tmp_path):
    asked = json.dumps([words for words, _ in TYPOS.values()])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", CODE, asked], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    *said, imported = found.stdout.splitlines()
    assert imported == "set()"
    for line, (name, (_, what)) in zip(said, TYPOS.items(), strict=True):
        assert line.startswith("QuantDMError"), name
        assert what in line, name
    assert not list(tmp_path.iterdir())
