"""Where everything of a run is, as one of its students sees it.

In a chain of teachers each student has a teacher and a cache of its own: its link. The student of one link is the
teacher of the next.

    teacher -> caches/A -> students/A -> caches/B -> students/B -> cache -> students/student and all variants
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tristill.cache.remote import keep_copy
from tristill.pipeline.config import DEFAULT_STUDENT, Config
from tristill.pipeline.errors import ConfigError, MissingInputError
from tristill.pipeline.received import left_out_text, named_outside, refuse_outside
from tristill.stages.data.config import SyntheticText
from tristill.stages.models.description import CONFIG_NAME
from tristill.stages.models.origin import find_model
from tristill.stages.models.trust import trust_code_of, trust_records_of
from tristill.stages.progress import say

RUN_CONFIG_NAME = "config.toml"
_PLACE_OF_CACHE = ("cache.dir", "cache.url")


@dataclass(frozen=True)
class Workspace:
    """One config, the folders of its run, and the student whose link is looked at."""

    config: Config
    run_dir: Path
    name: str = DEFAULT_STUDENT
    given: frozenset[str] | None = None
    """Keys given on the command line, where the config is the run folder's own; None for one that the user named."""

    def __post_init__(self) -> None:
        given = self.config.teacher.path
        if given is not None and given.resolve().is_relative_to(self.run_dir.resolve()):
            raise ConfigError(
                f"teacher.path: found {given}, which is in the run folder {self.run_dir}, where steps replace files; "
                "expected a folder elsewhere: use another --run-dir"
            )
        if given is not None and self.config.teacher.trust_remote_code and not self.outside("teacher"):
            trusted = find_model(given, self.config.teacher.revision, download=False)
            if trusted is not None:
                trust_code_of(trusted)
        for name in self.config.link_names:
            link = self.config.for_student(name)
            url = None if self._outside(name, *_PLACE_OF_CACHE) else link.cache.url
            keep_copy(self._cache_of(name), url, link.cache.local_bytes, say)
        for student in (*self.config.student_names, *self.config.stages):
            further = self.config.for_student(student).distill.caches
            for one in () if self._outside(student, "distill.caches") else further:
                keep_copy(one.dir, one.url, one.local_bytes, say)
        source = self.config.data.source
        if isinstance(source, SyntheticText) and source.model.expanduser().resolve().is_relative_to(
            self.run_dir.resolve()
        ):
            raise ConfigError(
                f"data.source.model: found {source.model}, which this run folder makes from the corpus itself; "
                "expected a model of another run, so use another --run-dir"
            )

    def link(self, name: str) -> "Workspace":
        """The same run as another of its students sees it."""
        return replace(self, name=name)

    def outside(self, *tables: str) -> dict[str, Any]:
        """Values of this student's config that name something outside of the folder it came with, by dotted key.

        tables: prefixes of keys; none takes all. Empty for a config that the user named.
        """
        return self._outside(self.name, *tables)

    def _outside(self, name: str, *tables: str) -> dict[str, Any]:
        if self.given is None:
            return {}
        given = {key.removeprefix(f"stages.{name}.").removeprefix(f"variants.{name}.") for key in self.given}
        named = named_outside(self.config.for_student(name), self.run_dir, given)
        return {key: value for key, value in named.items() if not tables or key.startswith(tables)}

    def refuse_outside(self, *tables: str) -> None:
        """Raise OutsideError if there is any."""
        refuse_outside(self.outside(*tables), self.run_dir / RUN_CONFIG_NAME)

    def leave_out(self, *tables: str) -> None:
        """Say once what a command does without, if there is any."""
        if named := self.outside(*tables):
            say(left_out_text(named, self.run_dir / RUN_CONFIG_NAME))

    def link_of_cache(self, folder: Path) -> "Workspace":
        """The link whose cache is in this folder; the last one, if none is."""
        links = [self.link(name) for name in self.config.link_names]
        return next((link for link in links if link.cache.resolve() == folder.resolve()), links[-1])

    @property
    def taught_by(self) -> str | None:
        """The student that is the teacher of this link; None if it is the run's teacher."""
        return self.config.teacher_of(self.name)

    @property
    def data(self) -> Path:
        """Tokens and tokenizer."""
        return self.run_dir / "data"

    @property
    def teacher(self) -> Path:
        """The teacher of this link."""
        return self.run_dir / "teacher" if self.taught_by is None else self.student(self.taught_by)

    @property
    def cache(self) -> Path:
        """The cache of this link, or its local copy; that of a configured folder may be shared between runs.

        Where a config that came with the folder names another place, it is the folder's own: see `outside`.
        """
        return self._cache_of(self.name)

    @property
    def named_cache(self) -> Path:
        """The cache that the config names. Raises OutsideError where that came with the folder, and leads out of it."""
        self.refuse_outside(*_PLACE_OF_CACHE)
        return self.cache

    def _cache_of(self, name: str) -> Path:
        own = self.run_dir / ("caches/" + name if name in self.config.stages else "cache")
        if self._outside(name, *_PLACE_OF_CACHE):
            return own
        return self.config.for_student(name).cache.dir or own

    def student(self, name: str) -> Path:
        """One student."""
        return self.run_dir / "students" / name

    def model_folder(self, name: str) -> Path:
        """The folder of a model: `teacher`, a student of the run, or any by its path, from here or within the run."""
        own = [self.student(name), Path(name), self.run_dir / name]
        places = [self.run_dir / "teacher"] if name == "teacher" else own
        for folder in places:
            if (folder / CONFIG_NAME).is_file():
                if not folder.resolve().is_relative_to(self.run_dir.resolve()):
                    trust_records_of(folder, is_trusted=False)  # the folder was named, and nothing that it names
                return folder
        here = [path.parent for path in sorted(self.run_dir.glob(f"students/*/{CONFIG_NAME}"))]
        here += [self.run_dir / "teacher"] if (self.run_dir / "teacher" / CONFIG_NAME).is_file() else []
        raise MissingInputError(
            f"{name}: found no model in {' or '.join(str(place) for place in places)}; "
            + (f"there are {', '.join(path.name for path in here)}" if here else "run `tristill run --until distill`")
        )
