"""Reads the clips that the C program writes, and lays frames out as a picture."""
import av
import numpy as np
from PIL import Image


def read(path):
    """(frames uint8 [F, H, W, 3], frames a second) of a video file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def save_strips(path, clips, every=4):
    """Every so many frames of each clip [F, H, W, 3] side by side, one row a clip, as a picture."""
    Image.fromarray(np.concatenate([np.concatenate(list(clip[::every]), 1) for clip in clips])).save(path)
