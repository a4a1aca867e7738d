"""Where the bytes of the whole pipeline go, part by part, before and after."""

from quantdm.report.figures import describe
from quantdm.report.markup import esc, paragraph, table
from quantdm.report.records import Records
from quantdm.report.wording import megabytes


def split(records: Records) -> str:
    """Return a row per part: bytes before and after, under which scheme, and what that alone does to the images.

    Empty where the target is not that of the whole pipeline.
    """
    record = records.split
    if record is None:
        return ""
    names, recipe = ", ".join(records.settings.seen.denoisers), records.rows.get("recipe")
    after = record["denoisers"]["at_most"] if recipe is None else recipe["denoiser_bytes"]
    parts = [(names, record["denoisers"]["before"], after, "layer by layer", "–")]
    for name, part in record["parts"].items():
        how = "as it was" if part["label"] is None else describe(part["label"])
        parts.append((name, part["before"], part["after"], how, f"{part['fid_fp']:.4f}" if part["label"] else "0"))
    before, now = sum(row[1] for row in parts), sum(row[2] for row in parts)
    rows = [("", _cells(*row)) for row in parts]
    rows.append(("chosen", _cells("whole pipeline", before, now, "", "")))
    head = [("Part", ""), ("Before", "on disk"), ("After", "on disk"), ("How", ""), ("FID to full", "this part alone")]
    text = (
        f"The target is {record['target_bytes']:,} bytes for the weight files of all parts; {now:,} are used"
        f"{' at most' if recipe is None else ''}. Every option of every part was measured alone (fid_fp of one draw), "
        "and of all splits within the target that with the least sum was taken, with the denoisers as their one-layer "
        "errors choose. All quantized rows of the result have the other parts so."
    )
    return table(head, rows, text_columns=[3]) + paragraph(text, "caption")


def _cells(name: str, before: int, after: int, how: str, distance: str) -> list[str]:
    share = f"<small>{100 * after / before:.0f}\u00a0%</small>" if before else ""
    return [esc(name), esc(megabytes(before)), f"{esc(megabytes(after))} {share}", esc(how), esc(distance)]
