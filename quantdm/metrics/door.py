"""The one door to everything that measures: can this pipeline make, and can these features see, what is asked for?"""

from quantdm.errors import QuantDMError
from quantdm.metrics.chosen import check_chosen, check_counts
from quantdm.metrics.features import check_extractor
from quantdm.pipelines.checks import check_generates
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol, check_protocol
from quantdm.pipelines.signature import CallSignature, output_of

FRAMES = 2  # of a video, at least: each counts as an image
OF_LATENTS = "pyramid"  # the only features that latents have


def check_named(protocol: Protocol) -> None:
    """Check, before any pipeline is opened, that there are the features and metrics that a protocol names.

    Raises:
        QuantDMError: there are not, their weights are missing, or it is no protocol.
    """
    check_protocol(protocol)
    check_extractor(protocol.features)
    check_chosen(protocol)


def check_measures(pipe: DiffusionPipeline, protocol: Protocol, *, images: int | None = None) -> None:
    """Check, before anything is computed, that a pipeline can be measured by a protocol.

    `images` of a draw must be enough for the metrics that it names (None: none of them is computed).

    Raises:
        QuantDMError: it makes no such images (see `check_generates`), there are no such features or metrics, or they
            are not of what is made.
    """
    check_named(protocol)
    check_generates(pipe, protocol)
    if protocol.output == "latent" and protocol.features != OF_LATENTS:
        raise QuantDMError(
            f"features: got {protocol.features!r} of latents, expected {OF_LATENTS!r}; or leave output out to measure "
            "images"
        )
    if images is not None and protocol.metrics:
        made = output_of(CallSignature.of(pipe), protocol)
        check_counts(protocol, images * (FRAMES if made == "video" else 1))
    if protocol.output == "latent" and protocol.real is not None:
        raise QuantDMError("real: latents cannot be compared with pictures; leave output or real out")
