"""Damage of any kind is one step back with one warning; nothing that is not ours is deleted."""

import errno
import json
import os
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints, SaveFailed, alias, array_files, manifest
from moe_jax.errors import UserError

SIZE = 1000
LIKE = {"x": jax.ShapeDtypeStruct((SIZE,), jnp.float32)}
STEPS = {12: 3.0, 26: 1.0, 39: 2.0}  # and their scores


def open_dir(path, keep=3, keep_best=0):
    return Checkpoints(path, every=1, keep=keep, keep_best=keep_best)


def save(checkpoints, step, score=None):
    tree = {"x": jnp.full(SIZE, step, jnp.float32)}
    metadata = {"config": {"rate": 0.001}, "data": "abc"}
    return checkpoints.save(step, tree, metadata=metadata, score=score, stacked=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "checkpoints"
    checkpoints = open_dir(path)
    for step, score in STEPS.items():
        save(checkpoints, step, score)
    checkpoints.close()
    return path


@pytest.fixture
def three(template, tmp_path):
    """A directory with sound checkpoints of steps 12, 26 and 39."""
    return shutil.copytree(template, tmp_path / "checkpoints")


def step_dir(directory, step):
    return directory / f"step_{step:08d}"


def names(directory):
    return sorted(path.name.removeprefix("step_000000") for path in directory.iterdir())


def largest(path):
    files = [file for file in (path / "state").rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def edit(path, **changes):
    """Writes a manifest without a digest of itself; None takes an entry away."""
    content = manifest.read(path) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (path / manifest.MANIFEST).write_text(json.dumps(kept))


def replace(file, make):
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    make(file)


def bind(file):
    """Puts a socket in the place of a file; its path is short, as sockets need it."""
    with socket.socket(socket.AF_UNIX) as end:
        short = f"/tmp/moe_jax_{os.getpid()}"
        end.bind(short)
        os.rename(short, file)


def link_to(target):
    return lambda file: file.symlink_to(target)


def manifest_of(text):
    return lambda path: (path / manifest.MANIFEST).write_text(text)


def of_manifest(make):
    return lambda path: replace(path / manifest.MANIFEST, make)


def of_array(make):
    return lambda path: replace(largest(path), make)


DAMAGES = {
    "a pipe as manifest": of_manifest(os.mkfifo),
    "a pipe as array": of_array(os.mkfifo),
    "a socket as array": of_array(bind),
    "a directory as manifest": of_manifest(os.mkdir),
    "a read error of the manifest": of_manifest(link_to("/proc/self/mem")),
    "a read error of an array": of_array(link_to("/proc/self/mem")),
    "a device without end": of_manifest(link_to("/dev/zero")),
    "a link to nothing": of_manifest(link_to("nowhere")),
    "a manifest that links to itself": of_manifest(link_to(manifest.MANIFEST)),
    "a step that links to itself": lambda path: replace(path, link_to(path.name)),
    "arrays that link to their parent": lambda path: replace(path / "state", link_to("..")),
    "no arrays": lambda path: shutil.rmtree(path / "state"),
    "an empty manifest": manifest_of(""),
    "null": manifest_of("null"),
    "a list nested too deep": manifest_of("[" * 100_000),
    "a dict nested too deep": manifest_of('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a number too long": manifest_of('{"step": ' + "9" * 10_000 + "}"),
    "bytes that are no text": lambda path: (path / manifest.MANIFEST).write_bytes(b"\xff\xfe\x00{"),
    "no metadata": lambda path: edit(path, metadata=None),
    "metadata that is a list": lambda path: edit(path, metadata=[1]),
    "files that are a list": lambda path: edit(path, files=["state"]),
    "a file without digest": lambda path: edit(path, files={"state/_METADATA": 3}),
    "a file whose name has a zero byte": lambda path: edit(path, files={"a\0": [1, "b"]}),
    "an array without shape": lambda path: edit(path, arrays={"x": "float32"}),
    "a step that is text": lambda path: edit(path, step="39"),
    "the manifest of another step": lambda path: edit(path, step=26),
    "a score that is text": lambda path: edit(path, score="good"),
    "an entry that nobody writes": lambda path: edit(path, sha25=3),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_one_step_back_with_one_warning(three, what, caplog):
    DAMAGES[what](step_dir(three, 39))
    checkpoints = open_dir(three, keep=1)
    assert checkpoints.latest() == 26
    assert caplog.text.count("is damaged") == 1
    with pytest.raises(UserError, match=r"step_00000039 is damaged \("):
        checkpoints.path(39)
    assert names(three) == ["12", "26", "39"]  # who reads renames nothing
    np.testing.assert_array_equal(checkpoints.restore(26, LIKE, stacked=False)["x"], 26)
    assert checkpoints.latest() == 26
    assert caplog.text.count("is damaged") == 1


def test_damage_never_takes_the_place_of_a_sound_checkpoint(three, caplog):
    """With keep = 1 and a damaged newest step, a save of a lower number is what stays and what is
    found.
    """
    flip(largest(step_dir(three, 39)), 80)
    checkpoints = open_dir(three, keep=1)
    assert checkpoints.latest() == 26
    save(checkpoints, 30)
    checkpoints.close()
    assert names(three) == ["30", "39.damaged0"]
    again = open_dir(three, keep=1)
    assert again.latest() == 30
    assert caplog.text.count("is damaged") == 1


def test_pruning_counts_sound_checkpoints_alone(three, caplog):
    """Step 26 is the best by its score, and the second of the last two; it is damaged, which nobody
    knew.
    """
    flip(largest(step_dir(three, 26)), 80)
    last = open_dir(three, keep=3)
    save(last, 50)
    last.close()
    assert names(three) == ["12", "26.damaged0", "39", "50"]
    assert caplog.text.count("is damaged") == 1


def test_the_best_is_a_sound_one(three):
    flip(step_dir(three, 26) / manifest.MANIFEST, 4000)
    checkpoints = open_dir(three, keep=1, keep_best=1)
    save(checkpoints, 50)
    checkpoints.close()
    assert names(three) == ["26.damaged0", "39", "50"]


def test_every_flipped_bit_of_a_manifest_is_damage(three):
    path = step_dir(three, 39)
    content = manifest.read(path)
    raw = (path / manifest.MANIFEST).read_bytes()
    for bit in np.random.RandomState(0).permutation(len(raw) * 8)[:300].tolist():
        flip(path / manifest.MANIFEST, bit)
        # a flip in the spaces between the entries changes nothing that is read
        assert manifest.damage(path) or manifest.read(path) == content, bit
        (path / manifest.MANIFEST).write_bytes(raw)


def test_a_hundred_flipped_bits_over_all_files_are_damage(three):
    path = step_dir(three, 39)
    content = manifest.read(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    random = np.random.RandomState(1)
    for number in random.choice(len(files), 100, p=sizes / sizes.sum()):
        raw = files[number].read_bytes()
        bit = int(random.randint(len(raw) * 8))
        flip(files[number], bit)
        assert manifest.damage(path) or manifest.read(path) == content, (files[number], bit)
        files[number].write_bytes(raw)
    assert not manifest.damage(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "state/../../secret"])
def test_a_manifest_that_leads_outside_is_damage(three, name):
    """Also where it is signed: whoever writes one can compute its digest."""
    path = step_dir(three, 39)
    content = manifest.read(path)
    content["files"][name] = [0, "0" * 64]
    content[manifest.OWN_DIGEST] = manifest.own_digest(content)
    (path / manifest.MANIFEST).write_text(json.dumps(content))
    assert "'files'" in manifest.damage(path)
    assert open_dir(three).latest() == 26


def test_a_manifest_without_a_digest_of_itself_is_read(three):
    edit(step_dir(three, 39))
    assert manifest.OWN_DIGEST not in (step_dir(three, 39) / manifest.MANIFEST).read_text()
    checkpoints = open_dir(three)
    assert checkpoints.latest() == 39 and checkpoints.metadata(39)["data"] == "abc"


def test_what_is_not_ours_is_left_alone(three):
    foreign = ["step_²", "step_00000051", "step_51", "step_00000052.orbax-checkpoint-tmp", "notes"]
    for name in foreign:
        (three / name).mkdir()
        (three / name / "mine.txt").write_text("mine")
    (three / "step_00000053").symlink_to(three / "notes")
    (three / "step_00000054").write_text("a file")
    os.mkfifo(three / "step_00000055")
    checkpoints = open_dir(three, keep=1)
    for step in range(50, 57):
        save(checkpoints, step)
    checkpoints.close()
    assert checkpoints.steps() == [56]
    moved = {"step_00000051", "step_00000052.orbax-checkpoint-tmp"}
    for name in foreign:
        place = three / (name + ".old0" if name in moved else name)
        assert (place / "mine.txt").read_text() == "mine"
    kept = ["step_00000053.old0", "step_00000054.old0", "step_00000055.old0"]
    assert all(os.path.lexists(three / name) for name in kept)


def test_a_link_to_a_checkpoint_is_pruned_without_what_it_leads_to(three, tmp_path):
    """As when a checkpoint was moved to a larger disk."""
    step_dir(three, 12).rename(tmp_path / "moved")
    step_dir(three, 12).symlink_to(tmp_path / "moved")
    checkpoints = open_dir(three, keep=1)
    assert manifest.damage(step_dir(three, 12)) == ""
    save(checkpoints, 50)
    checkpoints.close()
    assert names(three) == ["50"]
    assert (tmp_path / "moved" / manifest.MANIFEST).exists()


def test_a_later_checkpoint_of_another_history_is_set_aside(three, caplog):
    """The next start finds what was saved last, whatever its number is."""
    checkpoints = open_dir(three)
    save(checkpoints, 20)
    checkpoints.close()
    assert names(three) == ["12", "20", "26.old0", "39.old0"]
    assert open_dir(three).latest() == 20
    assert "was in the way" in caplog.text


def test_a_checkpoint_that_somebody_removed_is_saved_again(three):
    checkpoints = open_dir(three)
    assert save(checkpoints, 50)
    assert not save(checkpoints, 50)
    shutil.rmtree(step_dir(three, 50))
    assert save(checkpoints, 50)
    checkpoints.close()
    assert open_dir(three).latest() == 50


def test_a_save_that_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    """The index of the arrays is lost between Orbax and the manifest."""
    start = array_files.ocp.save_async

    class Lost:
        def __init__(self, path, arrays):
            self.path, self.response = path, start(path, arrays)

        def result(self):
            self.response.result()
            os.unlink(os.path.join(self.path, "state", "manifest.ocdbt"))

    monkeypatch.setattr(array_files.ocp, "save_async", Lost)
    checkpoints = open_dir(tmp_path / "c")
    save(checkpoints, 1)
    with pytest.raises(SaveFailed, match=r"saving .*/c/step_00000001 failed") as error:
        checkpoints.close()
    assert "/proc/self" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    again = open_dir(tmp_path / "c")
    assert again.latest() is None
    save(again, 2)  # sweeps away what we left
    again.close()
    assert sorted(os.listdir(tmp_path / "c")) == ["step_00000002"]


PATHS = [
    "sweep[1]",
    "[!a] *?",
    "a\\b",
    "50%{x,y}",
    "'\"~",
    "-n",
    "gs:",
    "x.__lock",
    "new\nline",
    "日本 é",
    "b\udcff",
]


@pytest.mark.parametrize("name", PATHS)
def test_checkpoints_below_any_path(tmp_path, name):
    directory = tmp_path / name / "checkpoints"
    checkpoints = open_dir(directory, keep=1)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.close()
    assert os.listdir(directory) == ["step_00000002"]
    assert os.listdir(tmp_path) == [name]  # nothing was written to another place
    np.testing.assert_array_equal(open_dir(directory).restore(2, LIKE, stacked=False)["x"], 2)


def test_where_directories_have_one_name_a_strange_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(alias, "OPEN_FILES", tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot be written to .*sweep\[1\].* misreads '\[' '\]'"):
        open_dir(tmp_path / "sweep[1]")
    checkpoints = open_dir(tmp_path / "plain-1.2")
    save(checkpoints, 1)
    checkpoints.close()
    assert open_dir(tmp_path / "plain-1.2").latest() == 1


def test_a_directory_that_cannot_be_listed_is_one_error(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match=r"/c holds no checkpoints .*: Not a directory"):
        open_dir(tmp_path / "c").latest()


def test_an_old_checkpoint_that_cannot_be_deleted_stays(three, monkeypatch, caplog):
    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    checkpoints = open_dir(three, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(checkpoints, 50)
        checkpoints.close()
    assert checkpoints.steps() == [50]
    assert caplog.text.count("cannot be deleted") == 3
    again = open_dir(three, keep=1)
    save(again, 51)
    again.close()
    assert names(three) == ["51"]
