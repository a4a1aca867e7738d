"""What a target for a whole pipeline leaves for its denoisers, to the byte, before anything is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.hub.planned import OtherPart, other_parts
from quantdm.hub.size import ExportSize
from quantdm.pipelines.source import open_source
from quantdm.pipelines.subject import Subject
from quantdm.schemes import ORIGINAL, Scheme

# What a text encoder or a VAE may take as a whole: nobody records what its layers see, so nothing is calibrated.
PART_OPTIONS: tuple[Scheme, ...] = (
    ORIGINAL,
    *map(Scheme.parse, ("uniform-channel-8", "uniform-channel-6", "uniform-channel-5", "uniform-group64-4")),
)


@dataclass(frozen=True)
class Room:
    """A target, and what may be had for it.

    `parts` are the bytes of every other part under each of its options, by label, `stored` those of the denoisers'
    files as they are, and `denoisers` the least and the most that these can take, all together; `others` are the other
    parts themselves.
    """

    target: int
    others: tuple[OtherPart, ...]
    parts: dict[str, dict[str, int]]
    stored: int
    denoisers: tuple[int, int]

    @property
    def as_stored(self) -> int:
        """Bytes of the other parts as they are."""
        return sum(row[ORIGINAL.label] for row in self.parts.values())

    @property
    def smallest(self) -> int:
        """Bytes of the other parts, each under its smallest option."""
        return sum(min(row.values()) for row in self.parts.values())

    @property
    def rest(self) -> int:
        """Bytes for the denoisers while nothing is measured: beside parts as they are, in 8 bits, or at their least."""
        eight = sum(row.get(PART_OPTIONS[1].label, row[ORIGINAL.label]) for row in self.parts.values())
        least = self.denoisers[0]
        return next((rest for used in (self.as_stored, eight) if (rest := self.target - used) >= least),
                    self.target - self.smallest)  # fmt: skip

    @property
    def for_denoisers(self) -> int:
        """The rest, as far as denoisers can use it."""
        return min(self.rest, self.denoisers[1])

    def check(self, *, at_most: bool = True) -> None:
        """Check that something can be had for the target, and that it is not more than there is to spend on.

        Raises:
            QuantDMError: the least, or the range, and what takes it.
        """
        least, most = self.smallest + self.denoisers[0], self.as_stored + self.denoisers[1]
        if self.target < least:
            told = []
            for name, row in self.parts.items():
                label = min(row, key=lambda option: row[option])
                told.append(f"{name} {row[label]} ({label})")
            alone = "already the other parts alone are larger: " if self.smallest > self.target else ""
            raise QuantDMError(
                f"target: got {self.target} bytes for the pipeline, expected {least} or more: {alone}other parts take "
                f"{self.smallest} at least ({', '.join(told)}), and the denoisers {self.denoisers[0]} with these "
                "options; raise --pipeline-size (target_pipeline_bytes), or give options of fewer bits"
            )
        if at_most and self.target > most:
            raise QuantDMError(
                f"target: got {self.target} bytes for the pipeline, but these options reach {least} to {most} bytes: "
                "the weight files of all its parts"
            )

    def record(self) -> dict[str, Any]:
        """Return plain numbers."""
        given = {"target_pipeline_bytes": self.target, "parts": self.parts, "denoisers_stored": self.stored}
        return given | {"denoisers": list(self.denoisers), "rest": self.rest}

    def text(self) -> str:
        """Say what remains for the denoisers after the other parts."""
        lines = [f"target: {self.target:,} bytes, the weight files of the whole pipeline"]
        for name, row in self.parts.items():
            label = min(row, key=lambda option: row[option])
            smaller = "" if label == ORIGINAL.label else f", {row[label]:,} at least ({label})"
            lines.append(f"  {name}: {row[ORIGINAL.label]:,} bytes as it is{smaller}")
        for what, used in (("as they are", self.as_stored), ("at their least", self.smallest)):
            rest = self.target - used
            enough = "" if rest >= self.denoisers[0] else f", too few: they take {self.denoisers[0]:,} at least"
            lines.append(f"  other parts {what}: {max(rest, 0):,} bytes remain for the denoisers{enough}")
        lines.append(f"  denoisers: {self.stored:,} bytes as they are; how the parts share is measured in the run")
        return "\n".join(lines)


def room_of(
    subject: Subject, options: Sequence[Scheme], embeddings: Scheme | None, target: int, *, at_most: bool = True
) -> Room:
    """Return what a target for all parts of a pipeline leaves for its denoisers; only headers are read for it.

    Args:
        subject: its files lie somewhere.
        options: of the denoisers' layers.
        embeddings: scheme of the denoisers' embedding tables.
        target: bytes of the weight files of all parts.
        at_most: refuse a target that is larger than everything.

    Raises:
        QuantDMError: the pipeline has no files, or not of all parts; a target that is out of reach.
    """
    if not subject.location:
        raise QuantDMError(
            "target: the size of all parts is asked for, and the pipeline is in memory, where it has no files; save "
            "it with save_pretrained and give the folder, or give target_bits or target_bytes"
        )
    source = open_source(subject.location)
    others = tuple(other_parts(source))
    parts = {part.name: sizes_of(part) for part in others}
    size, files = ExportSize(subject.pipe, embeddings=embeddings), [source.parts.get(n) for n in subject.part_names]
    stored = sum(path.stat().st_size for part in files if part is not None for path in part.files)
    found = Room(target, others, parts, stored if all(files) else size.of(None), size.extremes(options))
    found.check(at_most=at_most)
    return found


def sizes_of(part: OtherPart) -> dict[str, int]:
    """Return the bytes of a part's files under every option that it can take, by label."""
    options = PART_OPTIONS if part.has_layers else PART_OPTIONS[:1]
    return {option.label: part.bytes_under(part.rules(None if option == ORIGINAL else option)) for option in options}
