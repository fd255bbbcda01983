#!/usr/bin/env python3
"""Compares sora's Y4M with the video tensor: by the formula of the colour matrix, and by ffmpeg.

    python tests/reference_y4m.py [--sora ./sora] [--model tests/goldens/model/model.gguf]

1. Every byte must be that of the formula in float64: BT.601's, or BT.709's from 1280 columns or 577 lines on.
2. ffmpeg's conversion, in fixed point, may differ by one. ffmpeg must read the file as limited range, with centred
   chroma, the given frame rate and the number of frames.
3. The commands of docs/options.md that make an MP4 must tag it, and its colours must be right by these tags.

Without ffmpeg on the machine, 2 and 3 are left out, and a line says so.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FRAMES = 5
WEIGHTS = {"bt601": (0.299, 0.587, 0.114), "bt709": (0.2126, 0.7152, 0.0722)}
COLORSPACE = {"bt601": "smpte170m", "bt709": "bt709"}  # in ffmpeg's words


@dataclass
class Clip:
    """A video by sora and its expected properties."""

    width: int
    height: int
    matrix: str
    chroma: int
    path: Path = Path()
    video: np.ndarray | None = None  # [3, F, Y, X]

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.chroma}"


CLIPS = [Clip(64, 48, "bt601", 420), Clip(64, 48, "bt601", 444), Clip(1272, 16, "bt601", 420),
         Clip(1280, 16, "bt709", 420), Clip(1280, 16, "bt709", 444), Clip(16, 576, "bt601", 420),
         Clip(16, 584, "bt709", 420)]


def generate(sora: Path, model: Path, folder: Path, clip: Clip) -> dict:
    """Makes the clip, and sets its path and video. Returns its record."""
    clip.path = folder / "clip.y4m"
    subprocess.run([sora, "-m", model, "-s", f"{clip.width}x{clip.height}", "-f", str(FRAMES), "--steps", "2",
                    "--seed", "1", "--fps", "30000:1001", "--chroma", str(clip.chroma), "-o", clip.path, "--dump",
                    folder, "--dump-only", "video", "a red fox"], check=True)
    clip.video = np.load(folder / "video.npy")
    return json.loads(clip.path.with_name("clip.y4m.json").read_text())


def planes(clip: Clip) -> np.ndarray:
    """The bytes of all frames without header and FRAME lines, [F, bytes of a frame]."""
    header, data = clip.path.read_bytes().split(b"\n", 1)
    frames = np.frombuffer(data, np.uint8).reshape(FRAMES, -1)
    assert all(frame[:6].tobytes() == b"FRAME\n" for frame in frames), header
    return frames[:, 6:]


def exact(clip: Clip) -> np.ndarray:
    """The planes before rounding, by the formula in float64, [F, bytes of a frame]."""
    weights = WEIGHTS[clip.matrix]

    def convert(rgb):
        y = sum(weight * colour for weight, colour in zip(weights, rgb))
        cb, cr = ((colour - y) / (2 - 2 * weight) for weight, colour in ((weights[2], rgb[2]), (weights[0], rgb[0])))
        return 125.5 + 109.5 * y, 128 + 112 * cb, 128 + 112 * cr

    video = clip.video.astype(np.float64)
    box = (video.reshape(3, FRAMES, clip.height // 2, 2, clip.width // 2, 2).mean((3, 5))
           if clip.chroma == 420 else video)
    parts = convert(video)[0], *convert(box)[1:]
    return np.concatenate([part.reshape(FRAMES, -1) for part in parts], 1)


def by_ffmpeg(clip: Clip) -> np.ndarray:
    """The planes by ffmpeg from the same frames, with the same averaging of chroma, [F, bytes of a frame]."""
    scale = (f"scale=out_color_matrix={clip.matrix}:out_range=tv:"
             "flags=area+accurate_rnd+full_chroma_inp+full_chroma_int")
    green_blue_red = ((clip.video[[1, 2, 0]].swapaxes(0, 1) + 1) / 2).astype("<f4")
    result = subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "gbrpf32le",
                             "-s", f"{clip.width}x{clip.height}", "-i", "-", "-vf",
                             f"{scale},format=yuv{clip.chroma}p", "-f", "rawvideo", "-"],
                            input=green_blue_red.tobytes(), capture_output=True, check=True)
    return np.frombuffer(result.stdout, np.uint8).reshape(FRAMES, -1)


def probe(path: Path, entries: str) -> dict:
    result = subprocess.run(["ffprobe", "-v", "error", "-count_frames", "-show_entries", f"stream={entries}", "-of",
                             "json", path], capture_output=True, check=True)
    return json.loads(result.stdout)["streams"][0]


def conversion(matrix: str) -> list[str]:
    """The command of docs/options.md that makes an MP4 of a clip of this matrix."""
    lines = re.findall(r"^ffmpeg -i clip\.y4m .*$", (ROOT / "docs" / "options.md").read_text(), re.M)
    return shlex.split(next(line for line in lines if f"colorspace={COLORSPACE[matrix]}:" in line))


def mean_colours(path: Path) -> np.ndarray:
    """The mean [red, green, blue] of a video in [-1, 1], read by ffmpeg."""
    result = subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-vf", "scale=out_range=pc,format=gbrp",
                             "-f", "rawvideo", "-"], capture_output=True, check=True)
    green, blue, red = np.frombuffer(result.stdout, np.uint8).reshape(FRAMES, 3, -1).mean((0, 2)) / 127.5 - 1
    return np.array([red, green, blue])


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

    def check_by_ffmpeg(clip: Clip, found: np.ndarray) -> None:
        error = np.abs(found - by_ffmpeg(clip)).max()
        claim(error <= 1, f"{clip}: ffmpeg makes the same bytes of the same frames (off by {error:.0f})")
        stream = probe(clip.path, "pix_fmt,color_range,chroma_location,r_frame_rate,nb_read_frames,width,height")
        expected = {"pix_fmt": f"yuv{clip.chroma}p", "color_range": "tv", "width": clip.width, "height": clip.height,
                    "r_frame_rate": "30000/1001", "nb_read_frames": str(FRAMES)}
        expected |= {"chroma_location": "center"} if clip.chroma == 420 else {}
        claim(expected.items() <= stream.items(), f"{clip}: ffprobe reads {stream}")

    def check_conversion(clip: Clip) -> None:
        command = conversion(clip.matrix)
        subprocess.run([*command[:1], "-v", "error", "-y", *command[1:]], cwd=clip.path.parent, check=True)
        movie = clip.path.with_suffix(".mp4")
        stream = probe(movie, "pix_fmt,color_range,color_space,color_transfer,color_primaries")
        expected = {"pix_fmt": "yuv420p", "color_range": "tv", "color_space": COLORSPACE[clip.matrix],
                    "color_transfer": "bt709", "color_primaries": "bt709"}
        claim(expected.items() <= stream.items(), f"{clip}: ffprobe reads the MP4's tags, {stream}")
        means = clip.video.mean((1, 2, 3))
        error = np.abs(mean_colours(movie) - means).max() * 127.5
        claim(error < 1, f"{clip}: the MP4's mean colours are the video's (off by {error:.2f} of 255)")

    has_ffmpeg = shutil.which("ffmpeg") and shutil.which("ffprobe")
    if not has_ffmpeg:
        print("no ffmpeg on this machine: only the formula is compared")
    for clip in CLIPS:
        with TemporaryDirectory() as work:
            record = generate(args.sora, args.model, Path(work), clip)
            claim(record["settings"]["matrix"].replace(".", "").lower() == clip.matrix,
                  f"{clip}: the record says {record['settings']['matrix']}")
            found, ideal = planes(clip).astype(np.float64), exact(clip)
            error = np.abs(found - ideal).max()
            claim(error < 0.5 + 1e-4, f"{clip}: {found.size} bytes are the formula's, rounded (off by {error:.4f})")
            if has_ffmpeg:
                check_by_ffmpeg(clip, found)
                check_conversion(clip)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
