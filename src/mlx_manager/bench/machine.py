"""What a figure was taken on and with: without this line it is a rumour."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("mlx", "mlx-lm", "mlx-manager")
SECRET_OPTIONS = ("--api-key", "--key", "--token")


@dataclass(frozen=True, slots=True)
class Machine:
    platform: str
    cpu: str
    num_cores: int
    memory_bytes: int
    python: str
    packages: tuple[tuple[str, str], ...]
    """(name, version); a package that is not installed is not listed."""
    git_revision: str | None
    """Of this package's own checkout, "+" where files differ from it; None for an installed package."""
    command: str

    @property
    def line(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.packages)
        revision = "" if self.git_revision is None else f", git {self.git_revision}"
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.cpu}, {self.num_cores} cores, {memory}; {self.platform}; Python {self.python}; {packages}{revision}"


def this_machine(argv: Sequence[str] | None = None) -> Machine:
    """Runs git and, on macOS, sysctl: call it off the event loop."""
    return Machine(
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        num_cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        packages=tuple((name, version) for name in PACKAGES if (version := _version(name)) is not None),
        git_revision=_git_revision(Path(__file__).resolve()),
        command=command_line(sys.argv if argv is None else argv),
    )


def command_line(argv: Sequence[str]) -> str:
    """As typed, quoted for a shell, with the program's bare name; the values of options that carry secrets are starred."""
    words: list[str] = []
    secret_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name in SECRET_OPTIONS
        words.append("***" if secret_next else f"{name}=***" if is_secret and equals else word)
        secret_next = is_secret and not equals
    if words:
        words[0] = Path(words[0]).name
    return " ".join(word if word.endswith("***") else shlex.quote(word) for word in words)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return name or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision(file: Path) -> str | None:
    """Asks for the file first: a package installed below somebody else's checkout must not borrow that one's revision."""
    here = ("git", "-C", str(file.parent))
    if _output(*here, "ls-files", "--error-unmatch", file.name) is None:
        return None
    revision = _output(*here, "rev-parse", "--short=12", "HEAD")
    changed = _output(*here, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}+" if revision and changed else revision


def _output(*command: str) -> str | None:
    """What a short command prints; None if there is no such program, or it fails, or it hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
