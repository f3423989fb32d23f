"""Pages as a real browser shows them: its own DOM, and the pixels of its window."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image  # TensorBoard brings it


def pixels(png: bytes) -> np.ndarray:
    """The pixels of an image [height, width, 3], integers from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int64)


def chromium(tmp_path: Path, *arguments: str) -> bytes:
    """Runs a headless chromium; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed")
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    switches += " --disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run([program, *switches.split(), profile, *arguments], capture_output=True, check=True).stdout


def area(image: np.ndarray, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(axis=2).sum())
