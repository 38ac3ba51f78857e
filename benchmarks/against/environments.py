"""Python environments for the sides, made from the project's extras when they are first needed."""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FILES = ("pyproject.toml", "constraints.txt")


def python_of(extra: str, folder: Path) -> Path:
    """Returns the interpreter of the environment with an extra, in `folder`/`extra`.

    What is there is used again, unless the project asks for other packages since then.

    Raises:
      subprocess.CalledProcessError: it can't be installed; pip has said why.
    """
    place = folder / extra
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in _FILES)).hexdigest()
    installed = place / "installed"
    if not installed.is_file() or installed.read_text() != wanted:
        print(f"installing .[{extra}] into {place}", file=sys.stderr)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[{extra}]"]
        # Wheels are not worth keeping: PyTorch's is large.
        install += ["--no-cache-dir", "-c", ROOT / "constraints.txt"]
        subprocess.run(install, check=True)
        installed.write_text(wanted)
    return python
