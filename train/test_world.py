"""Quick checks of the world, its pictures and the detector: python -m pytest train/test_world.py"""
import dataclasses
import itertools
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import detect
import draw
import world


def test_a_scene_is_a_pure_function_of_seed_and_index():
    assert [world.scene(5, i) for i in range(50)] == [world.scene(5, i) for i in range(50)]
    assert world.scene(5, 0) != world.scene(6, 0)
    assert np.array_equal(draw.draw(world.scene(5, 1), 48, 9), draw.draw(world.scene(5, 1), 48, 9))


def test_one_combination_in_seven_is_held_out_and_never_drawn_for_training():
    held = [world.is_held_out(s, c, m) for s in world.SHAPES for c in world.COLOURS for m in world.motions_of(s)]
    assert 0.11 < np.mean(held) < 0.17
    for held_out in (False, True):
        subjects = [x for i in range(500) for x in world.scene(7, i, held_out=held_out).subjects]
        assert {world.is_held_out(x.shape, x.colour, x.motion) for x in subjects} == {held_out}


def test_every_word_of_a_caption_is_in_the_vocabulary(monkeypatch):
    monkeypatch.setattr(world, "_junk", lambda rng, text: text)
    for i in range(2000):
        words = world.caption(world.scene(8, i), np.random.default_rng(i)).replace(",", " ").replace(".", " ").split()
        assert set(words) <= set(world.vocabulary())


def test_two_subjects_never_share_a_colour():
    scenes = [world.scene(9, i, ("pair", "relation")) for i in range(300)]
    assert all(len({x.colour for x in s.subjects}) == 2 for s in scenes)


def test_no_background_is_taken_for_a_subject():
    for name in world.BACKGROUNDS:
        for light in (0.96, 1.04):
            video = np.clip(draw.background(name, 96, 9) * light, 0, 255).astype(np.uint8)
            assert max(m.mean() for m in detect.colour_masks(video).values()) < 0.01, name


def test_the_detector_reads_clips_that_it_never_saw():
    shares, _ = detect.account(24, seed=11)
    assert all(share >= 0.9 for share in shares.values()), shares
    assert np.mean(list(shares.values())) >= 0.99, shares


def wrong(scene, video):
    """The attributes of a scene that the detector does not see in a clip."""
    return {name for name, ok in detect.compare(scene, detect.detect(video)).items() if not ok}


def singles(motion, count=3):
    """A few scenes of one subject with this motion."""
    scenes = (world.scene(11, i, ("single",)) for i in range(10_000))
    return list(itertools.islice((s for s in scenes if s.subjects[0].motion == motion), count))


def test_a_subject_that_disappears_does_not_count():
    for scene in singles("still") + singles("up"):
        video = draw.draw(scene)
        video[17:] = draw.background(scene.background, 96, 33)[17:]
        assert "count" in wrong(scene, video)


def test_a_subject_that_stops_moves_wrongly():
    for scene in singles("left") + singles("bounce") + singles("grow") + singles("spin"):
        video = draw.draw(scene)
        video[:] = video[4]
        assert "motion0" in wrong(scene, video), scene


def test_a_subject_that_changes_its_shape_has_none():
    for scene in singles("right"):
        subject = scene.subjects[0]
        other = dataclasses.replace(subject, shape="star" if subject.shape != "star" else "square")
        video = draw.draw(scene)
        video[21:] = draw.draw(dataclasses.replace(scene, subjects=(other,)))[21:]
        assert "shape0" in wrong(scene, video), scene


def test_a_second_subject_of_the_same_colour_never_passes():
    for scene in singles("still"):
        video, fill = draw.draw(scene), draw.FILL[scene.subjects[0].colour]
        video[:, 4:21, 4:21] = fill
        assert wrong(scene, video), scene


def test_one_subject_does_not_stand_for_two():
    for scene in itertools.islice((world.scene(11, i, ("pair",)) for i in range(100)), 3):
        marks = detect.compare(scene, detect.detect(draw.draw(dataclasses.replace(scene, subjects=scene.subjects[:1]))))
        assert not any(marks[f"{name}1"] for name in ("colour", "shape", "motion"))


def test_passing_behind_is_not_passing_in_front():
    scenes = (world.scene(11, i, ("relation",)) for i in range(1000))
    for scene in itertools.islice((s for s in scenes if s.relation == "pass"), 3):
        layers = [draw.subject_layer(x, t, r, 96) for x, (t, r) in zip(scene.subjects, draw.tracks(scene, 33))]
        video = draw.background(scene.background, 96, 33) * np.float32(scene.light)
        for layer in layers:
            draw.blend(video, layer)
        assert "relation" in wrong(scene, video.clip(0, 255).astype(np.uint8))


def test_nothing_is_seen_where_nothing_is():
    for name in world.BACKGROUNDS:
        assert detect.detect(draw.background(name, 96, 33).astype(np.uint8))["subjects"] == []


def test_another_scene_is_not_this_one():
    scenes = [world.scene(11, i, ("single",)) for i in range(6)]
    for scene, other in zip(scenes, scenes[1:]):
        assert wrong(other, draw.draw(scene)) & {"shape0", "colour0", "motion0"}
