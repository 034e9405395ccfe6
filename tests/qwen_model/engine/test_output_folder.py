"""Engines land where the user said, whole or not at all, and nothing that no build wrote is lost."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import qwen_model
from qwen_model import QwenModelError
from qwen_model.backends.torch import back_end
from qwen_model.common.files import write_whole
from qwen_model.common.work_folder import work_folder
from qwen_model.engine import output_folder
from qwen_model.interface.engine_config import EngineConfig


def build(model_dir, output_dir, **options):
    return qwen_model.build_engine(model_dir, output_dir=output_dir, **{"dtype": "float32", **options})


def refused(model_dir, output_dir, message):
    """The error comes before the work: nothing is written that has a progress."""
    with pytest.raises(QwenModelError, match=message) as caught:
        build(model_dir, output_dir, progress=lambda *step: pytest.fail("it was built"))
    assert "\n" not in str(caught.value)


def batch_size(engine):
    """A mark by which tests know an engine: it has to be whole, too."""
    qwen_model.load_engine(engine, device="cpu")
    return EngineConfig.read(engine).limits.max_batch_size


def names(folder):
    return sorted(os.listdir(folder))


ENGINE = ["config.json", "tokenizer.json", "tokenizer_config.json", "weights"]


def test_an_engine_is_replaced_and_other_folders_are_not(model_dir, tmp_path):
    target = tmp_path / "engine"
    target.mkdir()
    build(model_dir, target, max_batch_size=3)
    build(model_dir, target, max_batch_size=5)
    assert batch_size(target) == 5
    assert names(tmp_path) == ["engine"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    refused(model_dir, tmp_path / "mine", "mine already exists and is not an engine")
    refused(model_dir, tmp_path / "mine" / "letter.txt", "is not a folder")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an engine"])
def test_a_symbolic_link_stays_and_the_engine_goes_where_it_points(model_dir, tmp_path, there):
    target, link = tmp_path / "large disk" / "engine", tmp_path / "engine"
    if there != "nothing":
        target.mkdir(parents=True)
    if there == "an engine":
        build(model_dir, target, max_batch_size=3)
    link.symlink_to("large disk/engine")
    assert build(model_dir, link, max_batch_size=5).engine_dir == target
    assert link.is_symlink()
    assert batch_size(link) == batch_size(target) == 5
    assert (names(tmp_path), names(target.parent)) == (["engine", "large disk"], ["engine"])


def test_links_that_lead_nowhere_and_names_that_cannot_be(model_dir, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    refused(model_dir, tmp_path / "loop", "loop cannot be written: Too many levels of symbolic links")
    refused(model_dir, tmp_path / "loop" / "engine", "loop")
    refused(model_dir, tmp_path / "file" / "deep" / "engine", "file is a file, not a folder")
    refused(model_dir, tmp_path / ("n" * 300), "File name too long")
    refused(model_dir, tmp_path / "new" / ("n" * 300), "File name too long")
    refused(model_dir, f"{tmp_path}/a\0b", "null byte")
    assert names(tmp_path) == ["file", "loop"]
    longest = tmp_path / ("ü" * 127)  # 254 bytes
    build(model_dir, longest, max_batch_size=3)
    build(model_dir, longest, max_batch_size=5)
    assert batch_size(longest) == 5
    assert len(names(tmp_path)) == 3


def test_the_current_folder_is_filled_and_stays(model_dir, tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path / "engine")
    for size in (3, 5):
        build(model_dir, ".", max_batch_size=size)
        assert batch_size(".") == size
        assert names(".") == ENGINE
    monkeypatch.chdir(tmp_path / "engine" / "weights")
    build(model_dir, "..", max_batch_size=6)
    assert batch_size(Path.cwd().parent) == 6
    assert names(tmp_path) == ["engine"]


def test_a_current_folder_that_is_gone(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    refused(model_dir, "engine", "'engine' is no folder that can be written: .*No such file")
    for _ in range(2):
        build(model_dir, tmp_path / "engine")


def test_an_empty_folder_stays_itself_and_an_engine_keeps_its_mode(model_dir, tmp_path):
    target = tmp_path / "engine"
    target.mkdir(mode=0o700)
    before = target.stat().st_ino
    build(model_dir, target)
    assert target.stat().st_ino == before
    build(model_dir, target)
    assert target.stat().st_mode & 0o777 == 0o700


@contextmanager
def mounted(*arguments):
    """A mount point, where we may make one."""
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        yield Path(arguments[-1])
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)


@pytest.mark.parametrize("kind", ["another file system", "a folder of the same one"])
def test_a_mount_point_is_filled(model_dir, tmp_path, kind):
    """As a volume of Docker is."""
    target, elsewhere = tmp_path / "engine", tmp_path / "elsewhere"
    target.mkdir()
    (elsewhere / "lost+found").mkdir(parents=True)
    arguments = ["-t", "tmpfs", "none"] if kind == "another file system" else ["--bind", str(elsewhere)]
    with mounted(*arguments, str(target)):
        for size in (3, 5):
            build(model_dir, target, max_batch_size=size)
            assert batch_size(target) == size
        assert names(tmp_path) == ["elsewhere", "engine"]
        assert set(names(target)) - {"lost+found"} == set(ENGINE)


@pytest.mark.parametrize("name", ["notes.txt", "weights/mine.txt", "weights/deep/er/mine.txt", "deep/config.json"])
def test_foreign_files_at_any_depth_are_named_and_kept(model_dir, tmp_path, name):
    engine = tmp_path / "engine"
    build(model_dir, engine, max_batch_size=3)
    (engine / name).parent.mkdir(parents=True, exist_ok=True)
    (engine / name).write_text("keep me")
    first = "weights/deep" if name.startswith("weights/deep") else "deep" if name.startswith("deep") else name
    refused(model_dir, engine, rf"engine holds files that are not of an engine \({first}\): give another folder")
    assert (engine / name).read_text() == "keep me"
    assert batch_size(engine) == 3


def test_links_in_an_engine_are_foreign(model_dir, tmp_path):
    engine = tmp_path / "engine"
    build(model_dir, engine)
    (engine / "weights").rename(tmp_path / "weights")
    (engine / "weights").symlink_to(tmp_path / "weights")
    refused(model_dir, engine, r"holds files that are not of an engine \(weights\)")
    (engine / "weights").unlink()
    shutil.copytree(model_dir, engine / "weights" / "checkpoint")
    refused(engine / "weights" / "checkpoint", engine, "holds the checkpoint")


def test_files_that_come_while_the_engine_is_built(model_dir, tmp_path):
    engine = tmp_path / "engine"
    build(model_dir, engine, max_batch_size=3)
    build(model_dir, engine, max_batch_size=5, progress=lambda *step: (engine / "weights" / "notes.txt").touch())
    assert batch_size(engine) == 5
    assert (engine / "weights" / "notes.txt").exists()
    assert names(tmp_path) == ["engine"]

    def copy_a_checkpoint(*step):
        shutil.copytree(model_dir, tmp_path / "new", dirs_exist_ok=True)

    for _ in range(2):  # a new folder, and one that is there and empty when the build begins
        with pytest.raises(QwenModelError, match="new already exists and is not an engine"):
            build(model_dir, tmp_path / "new", progress=copy_a_checkpoint)
        assert names(tmp_path / "new") == names(model_dir)
        shutil.rmtree(tmp_path / "new")
        (tmp_path / "new").mkdir()


def test_a_build_may_not_write_what_the_next_would_not_replace(tmp_path):
    with pytest.raises(RuntimeError, match="sheep"), output_folder.written_whole(tmp_path / "engine") as folder:
        (folder / "sheep").touch()
    assert names(tmp_path) == []


def test_a_timing_cache_is_not_kept_in_the_engines_folder(model_dir, tmp_path):
    with pytest.raises(QwenModelError, match="would be in the engine's folder"):
        build(model_dir, tmp_path / "engine", backend="tensorrt", timing_cache=tmp_path / "engine" / "cache")


def test_a_build_that_fails_leaves_nothing(model_dir, tmp_path):
    written = []

    def fail(phase, done, total):
        written.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model_dir, tmp_path / "a" / "b" / "engine", progress=fail)
    assert len(written) > 1
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_the_engine_before_it(model_dir, tmp_path):
    def fail(phase, done, total):
        raise OSError("disk full")

    build(model_dir, tmp_path / "engine", max_batch_size=3)
    with pytest.raises(QwenModelError, match="engine cannot be written: disk full"):
        build(model_dir, tmp_path / "engine", progress=fail)
    assert batch_size(tmp_path / "engine") == 3
    assert names(tmp_path) == ["engine"]


def test_a_disk_that_is_full_half_way(model_dir, tmp_path):
    """A limit on the size of files stands for it: the system refuses to write on, as with a full disk."""
    build(model_dir, tmp_path / "engine", max_batch_size=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(QwenModelError, match="engine cannot be written"):
            build(model_dir, tmp_path / "engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert batch_size(tmp_path / "engine") == 3
    assert names(tmp_path) == ["engine"]


def test_a_disk_that_tells_at_the_last_moment_that_it_is_full(model_dir, tmp_path, monkeypatch):
    """As NFS does."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    build(model_dir, tmp_path / "engine", max_batch_size=3)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(QwenModelError, match=r"engine cannot be written: No space left on device$"):
        build(model_dir, tmp_path / "engine")
    assert batch_size(tmp_path / "engine") == 3
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("options", ["size=1m", "nr_inodes=18"])
def test_real_disks_that_are_full(model_dir, tmp_path, options):
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "-o", options, "none", str(tmp_path / "disk")) as disk:
        build(model_dir, disk / "engine", max_batch_size=3)
        with pytest.raises(QwenModelError, match=r"engine cannot be written: .*No space left on device") as caught:
            build(model_dir, disk / "engine")
        assert "\n" not in str(caught.value)
        assert batch_size(disk / "engine") == 3
        assert names(disk) == ["engine"]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(model_dir, disk / "engine", "engine cannot be written: Read-only file system in .*disk/engine")
        refused(model_dir, disk / "other", "other cannot be written: Read-only file system in .*disk")


def test_an_engine_is_exchanged_in_one_step(model_dir, tmp_path, monkeypatch):
    build(model_dir, tmp_path / "engine", max_batch_size=3)
    (tmp_path / "other").mkdir()
    if not output_folder._exchange(tmp_path / "engine", tmp_path / "other"):
        pytest.skip("this file system cannot exchange")
    assert names(tmp_path / "engine") == []
    assert output_folder._exchange(tmp_path / "engine", tmp_path / "other")
    monkeypatch.setattr(output_folder, "_move_files", None)  # nothing else is needed
    build(model_dir, tmp_path / "engine", max_batch_size=5)
    assert batch_size(tmp_path / "engine") == 5
    assert names(tmp_path) == ["engine", "other"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(143)], ids=repr)
def test_where_folders_cannot_be_exchanged_the_old_engine_is_back_after_any_error(
    model_dir, tmp_path, monkeypatch, error
):
    """Each of the moves of files fails once, before or after it is done; then none does."""
    monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    engine, rename, moves, failing = tmp_path / "engine", Path.rename, [], 0
    build(model_dir, engine, max_batch_size=3)
    before = {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()}

    def failing_rename(path, target):
        moves.append(path.name)
        if len(moves) == 1 + failing > 1:  # the first is that of _stays
            if isinstance(error, SystemExit):  # a signal comes when it is done
                rename(path, target)
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    while failing < 2 * len(before):
        moves.clear()
        failing += 1
        with pytest.raises((QwenModelError, SystemExit), match=r"engine cannot be written.*No space left|143"):
            build(model_dir, engine, max_batch_size=5)
        assert {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()} == before
        assert names(tmp_path) == ["engine"]
    failing = 0
    moves.clear()
    build(model_dir, engine, max_batch_size=5)
    assert moves[1] == moves[-1] == "config.json"  # first out, last in
    assert batch_size(engine) == 5
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_that_is_replaced_while_it_is_loaded(model_dir, tmp_path, monkeypatch, dtype, can_exchange):
    """The new weights fit to what the old config.json said, or they do not."""
    if not can_exchange:
        monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    read, engine = back_end._read_weights, tmp_path / "engine"

    def replace_first(*arguments):
        monkeypatch.setattr(back_end, "_read_weights", read)
        build(model_dir, engine, dtype=dtype)
        return read(*arguments)

    build(model_dir, engine)
    monkeypatch.setattr(back_end, "_read_weights", replace_first)
    with pytest.raises(QwenModelError, match="was replaced while it was being loaded"):
        qwen_model.load_engine(engine, device="cpu")


def test_whom_the_umask_lets_read_may_read_all_files(model_dir, tmp_path):
    before = os.umask(0o027)
    try:
        build(model_dir, tmp_path / "engine")
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "engine").rglob("*")}
    assert modes == {True: 0o750, False: 0o640}


PROGRAM = """
import os, pathlib, shutil, sys, time
from qwen_model.command_line import run_command
from qwen_model.engine.output_folder import output_place, written_whole

def main(arguments):
    with written_whole(output_place(sys.argv[1], pathlib.Path('/nowhere'))) as folder:
        if len(sys.argv) == 2:
            (folder / 'weights').mkdir()
            print('writing', flush=True)
            for _ in range(600):
                time.sleep(0.1)  # a signal that comes just before one sleep is seen after it
        shutil.copytree(sys.argv[2], folder, dirs_exist_ok=True)  # an engine
        rename, moves = pathlib.Path.rename, []
        def rename_and_die(path, target):
            rename(path, target)
            moves.append(path)
            if len(moves) == int(sys.argv[3]):
                os.kill(os.getpid(), 9)
        pathlib.Path.rename = rename_and_die

run_command(main)
"""
"""As a build does, without what takes time: writes until it is stopped, or dies after some moves of files."""


def program(*arguments, **options):
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # those of a source tree too
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, **options
    )


@contextmanager
def a_build_that_writes(output_dir, **options):
    with program(output_dir, **options) as process:
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path, number):
    with a_build_that_writes(tmp_path / "engine") as process:
        assert len(names(tmp_path)) == 1
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP)],
)
def test_further_signals_do_not_interrupt_the_removal(tmp_path, numbers):
    """As from a supervisor that sends one after the other."""
    with a_build_that_writes(tmp_path / "engine") as process:
        for number in numbers:
            process.send_signal(number)
        assert process.wait(30) in {130, *(128 + number for number in numbers)}
    assert names(tmp_path) == []


def test_nohup_is_respected(tmp_path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with a_build_that_writes(tmp_path / "engine", **ignore) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.fixture(params=["beside", "inside"])
def place(request, tmp_path):
    """Of an engine whose hidden folder lies beside it or inside."""
    if request.param == "inside":
        (tmp_path / "engine").mkdir()
    return tmp_path / "engine"


def hidden_folder(place):
    (found,) = [path for path in (*place.parent.iterdir(), *place.glob("*")) if path.name.endswith(".building")]
    return found


def test_what_a_killed_build_left_is_removed_by_the_next(model_dir, place):
    with a_build_that_writes(place) as process:
        refused(model_dir, place, rf"another command \(process {process.pid} on .*\) is writing .*engine: wait")
        process.kill()
        process.wait()
        assert (hidden_folder(place) / "new" / "weights").is_dir()
    build(model_dir, place, max_batch_size=3)
    assert batch_size(place) == 3
    assert (names(place.parent), names(place)) == (["engine"], ENGINE)


def test_a_build_that_was_killed_before_it_wrote_anything(model_dir, place):
    with a_build_that_writes(place) as process:
        process.kill()
        process.wait()
        folder = hidden_folder(place)
    shutil.rmtree(folder)
    folder.mkdir()
    build(model_dir, place)
    shutil.rmtree(place)
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    build(model_dir, place)
    assert (names(place.parent), names(place)) == (["engine"], ENGINE)


def test_a_checkpoint_where_a_build_was_killed_is_left_alone(model_dir, tmp_path):
    (tmp_path / "engine").mkdir()
    with a_build_that_writes(tmp_path / "engine") as process:
        process.kill()
        process.wait()
    for name in ("config.json", "tokenizer.json"):  # names that an engine's files have, too
        shutil.copy(model_dir / name, tmp_path / "engine")
    refused(model_dir, tmp_path / "engine", "engine already exists and is not an engine")
    assert (tmp_path / "engine" / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()


def test_what_may_be_of_a_living_build_is_left_alone(model_dir, place):
    """The locks of other machines are not always seen; a container is no other machine, whatever it is called."""
    with a_build_that_writes(place) as process:
        process.kill()
        process.wait()
        folder = hidden_folder(place)
    maker = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps({**maker, "host": "another", "boot": "another"}))
    refused(model_dir, place, rf"{folder} may be of a run on another machine: if none runs, remove it")
    assert (folder / "new" / "weights").is_dir()
    (folder / "lock").write_text(json.dumps({**maker, "host": "a container"}))
    build(model_dir, place)
    assert not folder.exists()


def test_what_only_looks_like_a_build_is_left_alone(model_dir, place, tmp_path):
    with a_build_that_writes(place) as process:
        process.kill()
        process.wait()
        folder = hidden_folder(place)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused(model_dir, place, "is in the way, and not of a run")
    assert (tmp_path / "elsewhere" / "new" / "weights").is_dir()
    folder.unlink()
    folder.mkdir()
    (folder / "letter.txt").write_text("keep me")
    refused(model_dir, place, "is in the way, and not of a run")
    assert (folder / "letter.txt").read_text() == "keep me"


def test_two_builds_at_the_same_time(model_dir, tmp_path):
    """The one that began first goes on; the other says so."""
    build(
        model_dir,
        tmp_path / "engine",
        max_batch_size=3,
        progress=lambda *step: refused(model_dir, tmp_path / "engine", f"another command .process {os.getpid()} on"),
    )
    assert batch_size(tmp_path / "engine") == 3
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("filled", [False, True])
def test_builds_that_begin_and_end_at_the_same_moment(tmp_path, monkeypatch, filled):
    """Each of many either writes its engine whole or says that another build is writing, and none harms another."""

    place = tmp_path / "engine"
    if filled:
        place.mkdir()
        monkeypatch.chdir(place)

    def write(number):
        try:
            with output_folder.written_whole(place) as folder:
                (folder / "config.json").write_text(json.dumps({"format": "qwen_model.engine", "number": number}))
                (folder / "model.plan").write_text(str(number))
        except QwenModelError as error:
            return str(error)
        return "written"

    with ThreadPoolExecutor(8) as threads:
        results = set(threads.map(write, range(200)))
    assert "written" in results
    assert [said for said in results if not re.match("written|another command .*is writing", said)] == []
    config = json.loads((place / "config.json").read_text())
    assert (place / "model.plan").read_text() == str(config["number"])
    assert (names(tmp_path), names(place)) == (["engine"], ["config.json", "model.plan"])


@pytest.mark.parametrize("inside", [True, False])
def test_builds_that_begin_at_the_same_moment_inside_and_beside(tmp_path, monkeypatch, inside):
    """Where one folder lies inside the engine's and one beside it, the builds still find each other."""
    (tmp_path / "engine").mkdir()
    mkdir = Path.mkdir
    with ExitStack() as other_build:

        def begin_another_build_first(path, *arguments, **options):
            monkeypatch.setattr(Path, "mkdir", mkdir)
            other_build.enter_context(work_folder(tmp_path / "engine", inside=not inside))
            mkdir(path, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", begin_another_build_first)
        with (
            pytest.raises(QwenModelError, match=r"another command \(process .* is writing .*engine: wait"),
            work_folder(tmp_path / "engine", inside=inside),
        ):
            pytest.fail("two builds write at once")
        assert len([*tmp_path.iterdir(), *(tmp_path / "engine").iterdir()]) == 2  # the engine's and the other build's
    assert (names(tmp_path), names(tmp_path / "engine")) == (["engine"], [])


@pytest.mark.parametrize("moves", [1, 4, 8])
def test_a_build_that_was_killed_while_it_moved_files(model_dir, engine_dir, tmp_path, moves, monkeypatch):
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path / "engine")
    build(model_dir, ".", max_batch_size=3)
    with program(".", engine_dir, moves) as process:
        assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(QwenModelError, match="is not an engine"):
        qwen_model.load_engine(".", device="cpu")
    build(model_dir, ".", max_batch_size=5)
    assert batch_size(".") == 5
    assert names(".") == ENGINE


@contextmanager
def as_nobody():
    """Root may do everything: be somebody else meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public(model_dir):
    """A folder that everybody can reach and write, with a checkpoint in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(model_dir, folder / "model")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        yield folder
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o777)


def test_folders_that_may_not_be_written(public):
    model = public / "model"
    build(model, public / "engine", max_batch_size=3)
    (public / "mine").mkdir(mode=0o555)
    for path, said in (("engine", "engine"), ("engine/weights", "engine/weights"), ("mine", "mine")):
        (public / path).chmod(0o555)
        with as_nobody():
            refused(model, public / path.split("/")[0], f"cannot be written: Permission denied in {public}/{said}$")
            if path == "mine":
                refused(model, public / "mine" / "new" / "engine", f"Permission denied in {public}/mine$")
        (public / path).chmod(0o777)
    (public / "mine").chmod(0o000)
    with as_nobody():
        refused(model, public / "mine" / "engine", "engine cannot be written: Permission denied$")
    assert batch_size(public / "engine") == 3


def test_a_folder_that_may_be_written_in_one_that_may_not(public):
    target = public / "closed" / "engine"
    target.mkdir(parents=True)
    target.chmod(0o777)
    target.parent.chmod(0o555)
    with as_nobody():
        for size in (3, 5):
            build(public / "model", target, max_batch_size=size)
            assert batch_size(target) == size
    assert (names(target.parent), names(target)) == (["engine"], ENGINE)


def test_engines_that_may_not_be_read(public):
    engine = public / "engine"
    build(public / "model", engine)
    for name in ("config.json", "weights/layer_001.safetensors", "weights", "tokenizer.json", "."):
        mode = (engine / name).stat().st_mode
        (engine / name).chmod(0)
        with as_nobody(), pytest.raises(QwenModelError, match=r"engine.* cannot be read: Permission denied$"):
            qwen_model.load_engine(engine, device="cpu")
        (engine / name).chmod(mode)
    with pytest.raises(QwenModelError, match="cannot be read: File name too long"):
        qwen_model.load_engine(public / ("n" * 300))
    batch_size(engine)


def test_write_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"one")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"two")
    assert (tmp_path / "link").is_symlink()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o640)
    write_whole(tmp_path / ("n" * 255), b"three")
    assert len(names(tmp_path)) == 3


def test_write_whole_to_what_is_no_regular_file(tmp_path):
    """/dev/null must not become a regular file; a pipe stands for it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, b"content")


@pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.replace"])
def test_write_whole_on_a_full_disk(tmp_path, monkeypatch, function):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "file", b"one")
    monkeypatch.setattr(function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_write_whole_leaves_a_file_that_may_not_be_written(public):
    write_whole(public / "file", b"one")
    (public / "file").chmod(0o444)
    with as_nobody(), pytest.raises(PermissionError):
        write_whole(public / "file", b"two")
    assert (public / "file").read_bytes() == b"one"
    assert names(public) == ["file", "model"]
