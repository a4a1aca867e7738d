"""The snapshot: a pipeline that was changed after loading, kept in its run so that workers and later stages find it."""

import tempfile
from dataclasses import replace
from pathlib import Path

from quantdm.errors import QuantDMError
from quantdm.pipelines.subject import Subject
from quantdm.runs.run import SNAPSHOT, Run


def keep_snapshot(run: Run, subject: Subject) -> Subject:
    """Save a subject that lies nowhere else under RUN/subject, once; return it with its location.

    Raises:
        QuantDMError: the pipeline cannot be saved, and so neither be measured by workers nor exported.
    """
    if subject.location is not None:
        return subject
    folder = run.path(SNAPSHOT)
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=f".{SNAPSHOT}.", dir=run.folder) as temporary:
            made = Path(temporary) / SNAPSHOT
            try:
                subject.pipe.save_pretrained(made)
            except Exception as error:  # whatever a part raises when it is saved
                raise QuantDMError(
                    f"the pipeline was changed after loading and cannot be saved as it is ({type(error).__name__}: "
                    f"{error}); save it with save_pretrained and search that directory"
                ) from error
            made.rename(folder)
    return replace(subject, location=str(folder.resolve()))
