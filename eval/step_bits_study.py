"""Is a mix of activation bits over the steps better than uniform bits at equal bit operations?

python eval/step_bits_study.py digits-dit       # into eval/results/step_bits_study.json; run it again to go on

Weights of `kmeans-channel-4-feedback`, the pipeline's own sampler, 20 steps. Uniform are 6 bits in every step; mixed
are 4 and 8 bits, 6 on average, by the budgeted rule: the least sum of w_t q_b(t)^2 over the steps. Both without a
correction, and with room for the noise (variance, with memory), fitted for just these activations. Images and draws are
those of eval/correction_study.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from correction_study import BITS, SERVED, STEPS, Study, about, interval

from quantdm.correction import budgeted_bits, spec_of_steps, step_table
from quantdm.correction.fit import sampling
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.metrics.samples import Samples, compare
from quantdm.recipe import ActivationSpec

OUT = Path(__file__).parent / "results" / "step_bits_study.json"
VERSION, UNIFORM, LOW, HIGH = 1, "W4A6", 4, 8


def study(model: str) -> dict[str, Any]:
    """Measure uniform and mixed bits of a pipeline."""
    made = Study(model, UNIFORM)
    uniform, base = made.spec, made.kept.parent
    fits = {}
    for bits in (LOW, HIGH):
        made.spec = ActivationSpec.model_validate({"default": f"token-{bits}", "attention": f"token-{bits}"})
        fits[bits] = made.fitted(base / f"{bits} bits.safetensors")
    table = step_table(fits[LOW], made.pipe.scheduler, STEPS)
    bits = budgeted_bits(fits, [row["log_snr"] for row in table], (LOW + HIGH) / 2)
    low = ActivationSpec.model_validate({"default": f"token-{LOW}", "attention": f"token-{LOW}"})
    mixed = spec_of_steps(low, [row["timestep"] for row in table], bits)
    with sampling(made.pipe, None):
        exact = made.samples(SERVED[model][0], made.exact)
    found: dict[str, list[Samples]] = {}
    for name, spec in (("uniform", uniform), ("mixed", mixed)):
        made.spec = spec
        correction = made.fitted(base / f"{name}.safetensors").with_variant("variance")
        for way, given in (("none", None), ("variance", correction)):
            with made.quantized(), sampling(made.pipe, given):
                found[f"{name}, {way}"] = made.samples(f"{name}, {way}", made.kept)
            print(f"  {model} {name} {way}", flush=True)
    rows = {}
    for name, draws in found.items():
        figures = [compare(samples, reference) for samples, reference in zip(draws, exact, strict=True)]
        rows[name] = {key: [round(float(f[key] or np.inf), 5) for f in figures] for key in ("fid_fp", "psnr_fp")}
        if name.startswith("mixed"):
            rows[name]["gain_interval"] = interval(draws, found[name.replace("mixed", "uniform")], exact)
    return {"bits_per_step": bits, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *SERVED])
    for model in parser.parse_args().models or SERVED:
        record = read_json(OUT, version=VERSION) if OUT.is_file() else {"version": VERSION, "models": {}}
        if model not in record["models"]:
            record["models"][model] = study(model)
            common = about()
            common["settings"]["bits"] = {UNIFORM: BITS[UNIFORM], "mixed": [LOW, HIGH]}
            write_json(OUT, record | common)
            print(json.dumps({n: r["fid_fp"] for n, r in record["models"][model]["rows"].items()}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except QuantDMError as error:
        raise SystemExit(str(error)) from None
