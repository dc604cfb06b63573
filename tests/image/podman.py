"""Runs podman with options that also work in sandboxes."""

import os
import shutil
import subprocess
import tempfile

MISSING = "podman is not installed, and the image tests need it. Install it with: make podman"

# In many sandboxes, not even root may raise limits, and podman's default limits fail (setrlimit: Operation not
# permitted). These are lower, but sufficient for TensorFlow's threads.
LIMITS = ("--ulimit", "nofile=16384:16384", "--ulimit", "nproc=16384:16384")
# crun 1.8 (Debian bookworm) does not start on hosts that mount both versions of cgroups; runc does.
RUNTIME = ("--runtime", "runc")


def is_podman_missing() -> bool:
    """Whether podman is not installed."""
    return shutil.which("podman") is None


def run_podman(
    *arguments: str, seconds: float = 300, check: bool = True, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run podman, with additional environment variables."""
    completed = subprocess.run(
        ["podman", *RUNTIME, *arguments],
        env=os.environ | variables,
        cwd=tempfile.gettempdir(),  # podman's monitor leaves an empty file `oom` in its working directory
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert completed.returncode == 0 or not check, f"podman {' '.join(arguments)}: {completed.stderr}"
    return completed
