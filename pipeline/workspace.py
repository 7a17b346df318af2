"""Where everything of a run is, as one of its students sees it.

In a chain of teachers each student has a teacher and a cache of its own: its link. The student of one link is the
teacher of the next.

    teacher -> caches/A -> students/A -> caches/B -> students/B -> cache -> students/student and all variants
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cache.remote import keep_copy
from pipeline.config import DEFAULT_STUDENT, Config
from pipeline.errors import ConfigError, MissingInputError
from stages.data.config import SyntheticText
from stages.models.description import CONFIG_NAME
from stages.models.hub import find_model
from stages.models.trust import trust_code_of
from stages.progress import say

RUN_CONFIG_NAME = "config.toml"


@dataclass(frozen=True)
class Workspace:
    """One config, the folders of its run, and the student whose link is looked at."""

    config: Config
    run_dir: Path
    name: str = DEFAULT_STUDENT

    def __post_init__(self) -> None:
        given = self.config.teacher.path
        if given is not None and given.resolve().is_relative_to(self.run_dir.resolve()):
            raise ConfigError(
                f"teacher.path: found {given}, which is in the run folder {self.run_dir}, where steps replace files; "
                "expected a folder elsewhere: use another --run-dir"
            )
        if given is not None and self.config.teacher.trust_remote_code:
            trusted = find_model(given, self.config.teacher.revision, download=False)
            if trusted is not None:
                trust_code_of(trusted)
        for name in self.config.link_names:
            link = self.config.for_student(name)
            keep_copy(self._cache_of(name), link.cache.url, link.cache.local_bytes, say)
        for student in (*self.config.student_names, *self.config.stages):
            for further in self.config.for_student(student).distill.caches:
                keep_copy(further.dir, further.url, further.local_bytes, say)
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
        """The cache of this link, or its local copy; that of a configured folder may be shared between runs."""
        return self._cache_of(self.name)

    def _cache_of(self, name: str) -> Path:
        own = "caches/" + name if name in self.config.stages else "cache"
        return self.config.for_student(name).cache.dir or self.run_dir / own

    def student(self, name: str) -> Path:
        """One student."""
        return self.run_dir / "students" / name

    def model_folder(self, name: str) -> Path:
        """The folder of a model: `teacher`, a student of the run, or any by its path, from here or within the run."""
        own = [self.student(name), Path(name), self.run_dir / name]
        places = [self.run_dir / "teacher"] if name == "teacher" else own
        for folder in places:
            if (folder / CONFIG_NAME).is_file():
                return folder
        here = [path.parent for path in sorted(self.run_dir.glob(f"students/*/{CONFIG_NAME}"))]
        here += [self.run_dir / "teacher"] if (self.run_dir / "teacher" / CONFIG_NAME).is_file() else []
        raise MissingInputError(
            f"{name}: found no model in {' or '.join(str(place) for place in places)}; "
            + (f"there are {', '.join(path.name for path in here)}" if here else "run `tristill run --until distill`")
        )
