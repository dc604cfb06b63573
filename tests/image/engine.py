"""podman, as the tests call it."""

import os
import shutil
import subprocess
import tempfile

MISSING = "podman is not here, and the image can't be run without it. Install it with: make podman"

# Where root itself may not raise limits, as in many sandboxes, the limits that podman asks for by itself are refused
# (setrlimit: Operation not permitted): these are lower, and yet more than TensorFlow's threads need. crun 1.8 (Debian
# bookworm) refuses hosts with both versions of cgroups; runc doesn't.
LIMITS = ("--ulimit", "nofile=16384:16384", "--ulimit", "nproc=16384:16384")
RUNTIME = ("--runtime", "runc")


def is_missing() -> bool:
    """Whether podman has to be installed first."""
    return shutil.which("podman") is None


def podman(
    *arguments: str, seconds: float = 300, check: bool = True, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Call podman; `variables` are added to its environment."""
    ended = subprocess.run(
        ["podman", *RUNTIME, *arguments],
        env=os.environ | variables,
        cwd=tempfile.gettempdir(),  # podman's monitor leaves an empty file `oom` where it was started
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert ended.returncode == 0 or not check, f"podman {' '.join(arguments)}: {ended.stderr}"
    return ended
