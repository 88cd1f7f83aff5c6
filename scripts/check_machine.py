"""Say in one sentence what this machine lacks for `make setup`, before pip fails at length.

Runs on whatever Python 3 the user has, so it keeps to what old versions understand.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile


def fastecdsa_comes_built() -> bool:
    """Whether pip finds a wheel of the pinned fastecdsa, which libp2p needs, for this Python."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "-c", "constraints.txt", "-d", folder, "fastecdsa"]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def gmp_is_here() -> bool:
    """Whether a C compiler finds gmp.h and libgmp; fastecdsa's source build needs both."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "gmp_probe.c")
        with open(source, "w") as file:
            file.write("#include <gmp.h>\nint main(void) { mpz_t n; mpz_init(n); return 0; }\n")
        command = [compiler, source, "-lgmp", "-o", os.path.join(folder, "probe")]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def python_headers_are_here() -> bool:
    """Whether Python.h, which every source build includes, is installed."""
    return os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))


def what_is_missing() -> "str | None":
    """One sentence that says what to do, or None."""
    version = "{}.{}".format(*sys.version_info[:2])
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return (
            f"p2pfl_torrent needs Python 3.10 to 3.13 and {sys.executable} is {version}: "
            "name another one, for example `make setup PYTHON=python3.11`."
        )
    if importlib.util.find_spec("ensurepip") is None:
        return (
            "This Python cannot make virtual environments: install its venv module "
            "(on Debian: apt-get install python3-venv) and run make again."
        )
    can_build = gmp_is_here() and python_headers_are_here()
    if not can_build and not fastecdsa_comes_built():
        return (
            "libp2p's dependency fastecdsa must be built from source here, for which it needs a "
            "C compiler, libgmp and Python's headers: on Debian, apt-get install gcc libgmp-dev "
            "python3-dev, then run make again."
        )
    return None


if __name__ == "__main__":
    sys.exit(what_is_missing())
