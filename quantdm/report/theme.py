"""Light and dark: the colours of drawings become variables of the page, the dark ones mirror the light ones."""

import colorsys
import re

from quantdm.report.figures import BASELINE, FAINT, INK, MUTED, RECIPE, RULE

# Colours that style.css names in both themes; every other one of a drawing is mirrored.
NAMED = {INK: "ink", MUTED: "muted", FAINT: "faint", RULE: "rule", "#ffffff": "paper", RECIPE: "recipe"}
NAMED[BASELINE] = "baseline"
BRIGHTEST, RANGE = 0.93, 0.84  # lightness of black in the dark theme, and how much darker white is there


def themed(svg: str) -> str:
    """Replace the colours of a drawing (#rrggbb) by variables of the page."""
    return re.sub(
        r"\b(fill|stroke|stop-color)(: ?|=\")(#([0-9a-f]{6}))\b",
        lambda m: f"{m[1]}{m[2]}var(--{NAMED.get(m[3], 'x' + m[4])})",
        svg,
    )


def variables(page: str) -> str:
    """Return the style rules that give the variables of `themed` drawings their value in both themes."""
    used = sorted(set(re.findall(r"var\(--x([0-9a-f]{6})\)", page)))
    light = "".join(f"--x{hue}:#{hue};" for hue in used)
    dark = "".join(f"--x{hue}:{mirrored('#' + hue)};" for hue in used)
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n" if used else ""


def mirrored(hue: str) -> str:
    """Return a colour of the light theme for the dark one: same hue, light and dark exchanged."""
    red, green, blue = (int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5))
    angle, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    parts = colorsys.hls_to_rgb(angle, BRIGHTEST - RANGE * lightness, 0.85 * saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)
