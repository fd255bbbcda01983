#!/usr/bin/env python3
"""Compares the Y4M that sora writes with the video tensor it came from: by BT.601's formula, and by ffmpeg.

    python tests/reference_y4m.py [--sora ./sora] [--model tests/goldens/model/model.gguf]

The formula in float64 says what every byte has to be. ffmpeg's own conversion works in fixed point and may differ by
one; it also has to read the file as limited range, centred chroma, the frame rate that was asked for, and as many
frames. Without ffmpeg on the machine its part is left out, and said to be.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, FRAMES = 64, 48, 5
# The same range and averaging as sora's: BT.601, limited, four pixels to a chroma sample.
SCALE = "scale=out_color_matrix=bt601:out_range=tv:flags=area+accurate_rnd+full_chroma_inp+full_chroma_int"


def generate(sora: Path, model: Path, folder: Path, chroma: int) -> tuple[Path, np.ndarray]:
    """The file, and the video tensor [3, F, Y, X]."""
    clip = folder / f"clip{chroma}.y4m"
    subprocess.run([sora, "-m", model, "-s", f"{WIDTH}x{HEIGHT}", "-f", str(FRAMES), "--steps", "2", "--seed", "1",
                    "--fps", "30000:1001", "--chroma", str(chroma), "-o", clip, "--dump", folder,
                    "--dump-only", "video", "a red fox"], check=True)
    return clip, np.load(folder / "video.npy")


def planes(clip: Path) -> np.ndarray:
    """The bytes of all frames, [F, bytes of a frame]; the header and the FRAME lines are cut off."""
    header, data = clip.read_bytes().split(b"\n", 1)
    frames = np.frombuffer(data, np.uint8).reshape(FRAMES, -1)
    assert all(frame[:6].tobytes() == b"FRAME\n" for frame in frames), header
    return frames[:, 6:]


def exact(video: np.ndarray, chroma: int) -> np.ndarray:
    """What the planes have to be before rounding, in float64, [F, bytes of a frame]."""
    def convert(rgb):
        red, green, blue = rgb
        y = 0.299 * red + 0.587 * green + 0.114 * blue
        return 125.5 + 109.5 * y, 128 + 112 * (blue - y) / 1.772, 128 + 112 * (red - y) / 1.402

    video = video.astype(np.float64)
    box = video.reshape(3, FRAMES, HEIGHT // 2, 2, WIDTH // 2, 2).mean((3, 5)) if chroma == 420 else video
    parts = convert(video)[0], *convert(box)[1:]
    return np.concatenate([part.reshape(FRAMES, -1) for part in parts], 1)


def by_ffmpeg(video: np.ndarray, chroma: int) -> np.ndarray:
    """The planes as ffmpeg makes them of the same frames, [F, bytes of a frame]."""
    green_blue_red = ((video[[1, 2, 0]].swapaxes(0, 1) + 1) / 2).astype("<f4")
    result = subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "gbrpf32le",
                             "-s", f"{WIDTH}x{HEIGHT}", "-i", "-", "-vf", f"{SCALE},format=yuv{chroma}p",
                             "-f", "rawvideo", "-"],
                            input=green_blue_red.tobytes(), capture_output=True, check=True)
    return np.frombuffer(result.stdout, np.uint8).reshape(FRAMES, -1)


def read_by_ffmpeg(clip: Path) -> dict:
    entries = "stream=pix_fmt,color_range,chroma_location,r_frame_rate,nb_read_frames,width,height"
    result = subprocess.run(["ffprobe", "-v", "error", "-count_frames", "-show_entries", entries, "-of", "json", clip],
                            capture_output=True, check=True)
    return json.loads(result.stdout)["streams"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sora", type=Path, default=ROOT / "sora")
    parser.add_argument("--model", type=Path, default=ROOT / "tests/goldens/model/model.gguf")
    args = parser.parse_args()
    passed = failed = 0

    def claim(holds: bool, message: str) -> None:
        nonlocal passed, failed
        passed, failed = passed + bool(holds), failed + (not holds)
        print(f"{'ok' if holds else 'FAILED'}: {message}")

    has_ffmpeg = shutil.which("ffmpeg") and shutil.which("ffprobe")
    if not has_ffmpeg:
        print("no ffmpeg on this machine: only the formula is compared")
    with TemporaryDirectory() as work:
        for chroma in (420, 444):
            clip, video = generate(args.sora, args.model, Path(work), chroma)
            found, ideal = planes(clip).astype(np.float64), exact(video, chroma)
            error = np.abs(found - ideal).max()
            claim(error < 0.5 + 1e-4, f"{chroma}: {found.size} bytes are the formula's, rounded (off by {error:.4f})")
            if not has_ffmpeg:
                continue
            error = np.abs(found - by_ffmpeg(video, chroma)).max()
            claim(error <= 1, f"{chroma}: ffmpeg makes the same bytes of the same frames (off by {error:.0f})")
            stream = read_by_ffmpeg(clip)
            expected = {"pix_fmt": f"yuv{chroma}p", "color_range": "tv", "width": WIDTH, "height": HEIGHT,
                        "r_frame_rate": "30000/1001", "nb_read_frames": str(FRAMES)}
            expected |= {"chroma_location": "center"} if chroma == 420 else {}
            claim(expected.items() <= stream.items(), f"{chroma}: ffprobe reads {stream}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
