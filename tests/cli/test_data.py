"""The command line and its images: what is read, looked at, left out and said before anything is loaded."""

import json
import re
import shutil
import time

import pytest
from commands import checkpoint, done, run
from pictures import CLASSES, DOMAINS, write_image, write_set
from processes import free_port, on_ranks
from ranks import look_on_rank

from fastheads.cli import training
from fastheads.demo.base import MODEL, register
from fastheads.losses import context as contexts
from fastheads.train import evaluation, logs, progress
from fastheads.train.data import batches as data
from fastheads.train.data import images as images_module
from fastheads.train.report import figures

SHORT = ("--steps", "3", "--per-domain", "2", "--save-every", "1", "--workers", "0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    register()
    return checkpoint(tmp_path_factory.mktemp("weights") / "demo.safetensors", 0)


@pytest.fixture(autouse=True)
def unpainted(monkeypatch):
    """Reports without pictures, which take longer than all else here."""
    for name in ("bars", "curves", "gate_map", "gate_history", "source_and_target"):
        monkeypatch.setattr(figures, name, lambda *args, **options: b"png")


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


@pytest.fixture
def base(weights):
    return ("--model", MODEL, "--pretrained", weights)


@pytest.fixture
def unloaded(monkeypatch):
    """What is told must be told before any weights are loaded."""
    monkeypatch.setattr(training, "load_model", lambda args, classes=0: pytest.fail("the model was loaded first"))


def refused(*argv):
    """The one line of a command that is refused."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    return err


def images(text):
    """Domain → images, from `evaluate`'s lines."""
    return {name: int(count) for name, count in re.findall(r"^(\S+) .* of (\d+) images$", text, re.MULTILINE)}


def results(out):
    return json.loads((out / "results.json").read_text())


# --- what is read -------------------------------------------------------------------------------


def test_every_image_that_image_folder_reads_counts_and_the_rest_is_said(root, base):
    (root / "art" / "cat" / "grey.pgm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    write_image(root / "photo" / "dog" / "more" / "x.png")
    write_image(root / "__MACOSX" / "art" / "x.png")
    write_image(root / "photo" / "@eaDir" / "x.png")
    (root / "photo" / "dog" / "list.txt").touch()
    code, out, err = run("evaluate", *base, "--data", root, "--workers", "0")
    assert code == 0 and images(out) == {"art": 7, "photo": 11, "sketch": 4}
    assert err == (
        "fastheads: note: skipped: 1 not an image by extension (photo/dog/list.txt), 2 system folder (as __MACOSX)\n"
    )


def test_a_list_of_the_same_images_gives_the_same_lines(root, base):
    rows = [
        f"{path.relative_to(root.parent)},{path.parts[-2]},{path.parts[-3]}"
        for path in sorted(root.rglob("*.png"))[::-1]
    ]
    (root.parent / "list.csv").write_text("\n".join(["path,class,domain", *rows]))
    command = ("evaluate", *base, "--workers", "0", "--data")
    assert done(*command, root.parent / "list.csv") == done(*command, root)


def test_check_prints_how_many_images_there_are(root):
    (root / "art" / "notes.txt").touch()
    out = done("check", root)
    assert out == (
        "class  art  photo  sketch  all\n"
        "cat      3      5       2   10\n"
        "dog      3      5       2   10\n"
        "all      6     10       4   20\n"
        "skipped: 1 not an image by extension (art/notes.txt)\n"
        "all 20 images can be read\n"
    )


def test_check_names_what_cannot_be_read_and_says_so_in_its_exit_code(root):
    (root / "art" / "cat" / "1.png").write_bytes(b"")
    (root / "photo" / "dog" / "0.png").write_text("no image")
    code, out, err = run("check", root)
    assert (code, err) == (1, "")
    assert out.splitlines()[-3:] == [
        "2 of 20 images can't be read:",
        f"  {root}/art/cat/1.png: the file is empty",
        f"  {root}/photo/dog/0.png: no image format that Pillow knows",
    ]
    assert "gone: not found" in refused("check", root / "gone")


# --- images that can't be read ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_bad_image_of_any_domain_stops_before_the_model_is_loaded(root, base, unloaded, tmp_path, command):
    """Also one of the target, which would be drawn after all training."""
    for name in ("art/cat/1.png", "sketch/dog/0.png"):
        (root / name).write_bytes((root / name).read_bytes()[:100])
    options = ("--target", "sketch", "--out", tmp_path / "run") if command == "train" else ()
    err = refused(command, *base, "--data", root, *options)
    assert f"{root}/art/cat/1.png: not readable as an image (" in err and "2 of 20 images" in err
    assert "--data" in err and f"fastheads check {root}" in err and "--on-bad-image skip" in err


def test_only_the_domains_that_take_part_are_looked_at(root, base, tmp_path):
    (root / "sketch" / "dog" / "0.png").write_bytes(b"")
    done("evaluate", *base, "--data", root, "--domain", "art", "--workers", "0")
    done(
        *("train", *base, "--data", root, "--method", "zero-shot", "--workers", "0", "--out", tmp_path / "run"),
        *("--target", "art", "--sources", "photo"),
    )
    assert results(tmp_path / "run")["dataset"]["domains"] == ["art", "photo"]


def test_skip_leaves_bad_images_out_and_lists_them(root, base, tmp_path):
    """One that only decoding finds, as well."""
    write_image(root / "art" / "cat" / "1.png", size=(64, 64))
    content = bytearray((root / "art" / "cat" / "1.png").read_bytes())
    at = content.index(b"IDAT") + 40
    content[at : at + 4] = bytes(4)
    (root / "art" / "cat" / "1.png").write_bytes(bytes(content))
    (root / "sketch" / "dog" / "0.png").write_bytes(b"")
    command = (*base, "--data", root, "--on-bad-image", "skip", "--workers", "0")
    code, out, err = run("train", *command, "--target", "sketch", "--method", "zero-shot", "--out", tmp_path / "run")
    assert code == 0, err
    assert "every image is decoded first, all 20" in err
    assert f"left out: 2 of 20 images, the first {root}/art/cat/1.png: not readable" in err
    dataset = results(tmp_path / "run")["dataset"]
    assert [each["file"] for each in dataset["unreadable"]] == ["art/cat/1.png", "sketch/dog/0.png"]
    assert dataset["unreadable"][1]["reason"] == "the file is empty"
    assert dataset["images"] == {"art": 5, "photo": 10, "sketch": 3}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 images could not be read and were left out" in page and "sketch/dog/0.png" in page
    assert images(done("evaluate", *command)) == dataset["images"]


def test_skip_needs_an_image_of_every_class_to_be_left(root, base, unloaded):
    for path in (root / "sketch" / "dog").iterdir():
        path.write_bytes(b"")
    code, out, err = run("evaluate", *base, "--data", root, "--on-bad-image", "skip")
    assert (code, out) == (2, "")
    assert "no image that can be read of class 'dog' in domain 'sketch'" in err.splitlines()[-1]


def test_an_image_that_goes_bad_stops_a_run_which_resumes(root, base, tmp_path, monkeypatch):
    command = ("train", *base, "--data", root, "--target", "sketch", *SHORT, "--no-cache-images", "--out")
    done(*command, tmp_path / "whole")
    decode, drawn = data.decode, []

    def failing(path):
        drawn.append(path)
        if len(drawn) == 10:  # in the third step, of 4 images each
            path.write_bytes(b"")
        return decode(path)

    monkeypatch.setattr(data, "decode", failing)
    content = {path: path.read_bytes() for path in root.rglob("*.png")}
    code, out, err = run(*command, tmp_path / "run")
    monkeypatch.undo()
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"fastheads train: {drawn[-1]}: not readable as an image (the file is empty)")
    assert line.endswith("the same command goes on from the last saved state")
    assert str(drawn[-1]) in refused(*command, tmp_path / "run")
    drawn[-1].write_bytes(content[drawn[-1]])
    _, _, err = run(*command, tmp_path / "run")
    whole, again = (results(tmp_path / name)["runs"][0] for name in ("whole", "run"))
    assert again["history"]["loss"] == whole["history"]["loss"] and again["accuracy"] == whole["accuracy"]


@pytest.mark.slow
def test_processes_share_the_looking_and_know_the_same(root, tmp_path):
    bad = ["art/cat/0.png", "art/dog/1.png", "photo/cat/2.png"]
    for name in bad:
        (root / name).write_bytes(b"")
    on_ranks(look_on_rank, 2, 2, free_port(), sorted(root.rglob("*.png")), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"] == [[str(root / name), "the file is empty"] for name in bad]
    assert first["looked"] + second["looked"] == 20 == 2 * first["looked"]


# --- told before training -----------------------------------------------------------------------


def test_one_image_a_domain_is_refused_for_an_mmd_that_needs_two(root, base, unloaded):
    train = ("train", *base, "--data", root, "--target", "sketch", "--per-domain", "1")
    for method in ("dig", "hap"):
        err = refused(*train, "--method", "ha-lora", method)
        assert "--per-domain" in err and "--mmd-kernel" in err and method in err
    err = refused("train", *base, "--data", root, "--precision", "fp16", "--mmd-features", "embedding")
    assert "--precision" in err and "--mmd-features" in err


def test_one_source_is_noted_where_there_is_an_mmd(root, base, tmp_path):
    train = (
        "train",
        *base,
        "--data",
        root,
        "--target",
        "sketch",
        "--sources",
        "art",
        *SHORT,
        "--out",
        tmp_path / "run",
    )
    code, _, err = run(*train)
    assert code == 0, err
    (note,) = [line for line in err.splitlines() if "note" in line]
    assert "one source domain for sketch, art: the MMD of one domain is 0" in note and "--sources" in note
    assert "One source domain has no MMD: HAP" in (tmp_path / "run" / "report.html").read_text()
    code, _, err = run(*train, "--method", "zero-shot")
    assert code == 0 and "note" not in err


def test_a_probe_that_has_too_little_to_learn_from_is_refused(root, base, unloaded, tmp_path):
    probe = ("--method", "zero-shot", "linear-probe", "--workers", "0")
    for domain in DOMAINS:
        for label in CLASSES:
            for path in sorted((root / domain / label).iterdir())[1:]:
                path.unlink()
    err = refused("train", *base, "--data", root, "--target", "photo", "--seed", 0, 1, 2, 3, *probe)
    assert "--method: linear-probe: got no image of class" in err and "(art: 1, sketch: 1)" in err


def test_a_domain_of_one_image_is_named(root, base, unloaded):
    for domain in DOMAINS:
        shutil.rmtree(root / domain / "dog")
    for path in sorted((root / "art" / "cat").iterdir())[1:]:
        path.unlink()
    err = refused("train", *base, "--data", root, "--target", "photo", "--method", "hap")
    assert "1 image(s) in domain 'art'" in err


# --- sources, class names, paths ----------------------------------------------------------------


def test_sources_are_those_named_and_the_rest_is_held_out_in_turn(root, base, tmp_path):
    command = ("train", *base, "--data", root, "--method", "zero-shot", "--workers", "0", "--out")
    done(*command, tmp_path / "run", "--sources", "photo", "art", "photo")
    assert [(r["target"], r["sources"]) for r in results(tmp_path / "run")["runs"]] == [("sketch", ["art", "photo"])]
    err = refused(*command, tmp_path / "run", "--sources", "photo")
    assert "--sources: was ['art', 'photo'], now ['photo']" in err and not (tmp_path / "run/art").exists()
    done(*command, tmp_path / "other", "--sources", "photo")
    assert [(r["target"], r["sources"]) for r in results(tmp_path / "other")["runs"]] == [
        ("art", ["photo"]),
        ("sketch", ["photo"]),
    ]


def test_folders_of_one_object_stay_on_one_side_where_asked(root, base, tmp_path):
    """And a run whose split was another is refused."""
    for path in sorted(root.glob("*/*/*.*")):
        path.parent.joinpath(path.stem[-1]).mkdir(exist_ok=True)
        path.rename(path.parent / path.stem[-1] / path.name)
    command = ("train", *base, "--data", root, "--target", "sketch", "--method", "zero-shot", "--workers", "0", "--out")
    done(*command, tmp_path / "run", "--split-by", "folder")
    err = refused(*command, tmp_path / "run")
    assert "--split-by: was 'folder', now 'image'" in err


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--sources", "photo", "moon"), ["--sources", "no domain 'moon'", "art, photo, sketch"]),
        (("--sources", "photo", "art", "--target", "art"), ["--sources", "'art'", "--target"]),
        (("--sources", *DOMAINS), ["--sources", "every domain"]),
        (("--class-names", "gone.txt"), ["--class-names", "gone.txt", "not a file"]),
    ],
)
def test_bad_choices_are_told_before_the_model_is_loaded(root, base, unloaded, options, fragments):
    err = refused("train", *base, "--data", root, *options)
    assert all(fragment in err for fragment in fragments), err


def test_class_names_go_into_the_prompts_and_the_results(root, base, tmp_path, monkeypatch):
    (tmp_path / "names.json").write_text('{"cat": "house cat", "dog": "hound"}')
    seen = []
    encode = contexts.class_text_weights

    def spy(model, tokenizer, names, *rest):
        seen.append(list(names))
        return encode(model, tokenizer, names, *rest)

    monkeypatch.setattr(contexts, "class_text_weights", spy)
    done("evaluate", *base, "--data", root, "--workers", "0", "--class-names", tmp_path / "names.json")
    assert seen == [["house cat", "hound"]]
    train = ("train", *base, "--data", root, "--target", "art", "--method", "zero-shot", "--workers", "0")
    done(*train, "--class-names", tmp_path / "names.json", "--out", tmp_path / "run")
    assert results(tmp_path / "run")["dataset"]["class_names"] == ["house cat", "hound"]
    assert "house cat, hound" in (tmp_path / "run" / "report.html").read_text()
    result = json.loads((tmp_path / "run/art/seed0/zero-shot/result.json").read_text())
    assert result["key"]["class_names"] == ["house cat", "hound"]


def test_a_tilde_is_the_home_in_every_path(root, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "set")
    shutil.copy(weights, tmp_path / "demo.safetensors")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    given = ("--model", MODEL, "--pretrained", "~/demo.safetensors", "--data", "~/set", "--workers", "0")
    done("train", *given, "--target", "art", *SHORT, "--class-names", "~/names.txt", "--out", "~/run")
    adapter = ("--adapter", "~/run/art/seed0/hap/adapter")
    done("evaluate", *given, *adapter)
    done("inspect", *adapter)
    done("merge", *given[:4], *adapter, "--out", "~/merged.safetensors")
    done("check", "~/set")
    assert (tmp_path / "merged.safetensors").is_file() and not (tmp_path / "set" / "~").exists()


# --- in a log file ------------------------------------------------------------------------------


def test_a_log_file_hears_of_every_phase_that_lasts(root, base, tmp_path, monkeypatch):
    """What may take long, slowed down; a hundredth of a second stands for the half minute."""
    monkeypatch.setattr(progress, "SILENCE", 0.01)

    def slow(module, name, seconds=0.1):
        fast = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: time.sleep(seconds) or fast(*args, **options))

    slow(training, "load_model")
    slow(evaluation, "class_text_weights")
    slow(images_module, "look", 0.01)
    slow(data, "decode", 0.02)
    command = (
        "train",
        *base,
        "--data",
        root,
        "--target",
        "sketch",
        *SHORT,
        "--no-cache-images",
        "--out",
        tmp_path / "run",
    )
    code, _, err = run(*command, "--method", "linear-probe", "hap")
    assert code == 0, err
    for line in (
        r"  looking at the images: \d+/20 images, 0:0\d so far",
        rf"  loading {MODEL}: 0:0\d so far",
        r"  encoding prompts: 0:0\d so far",
        r"  features of art: \d/5 images, 0:0\d so far",
        r"  HAP · sketch · 0: \d/3, loss \d\.\d\d MMD -?\d\.\d{3} \d+ images/s, 0:0\d so far",
        r"  evaluating sketch: \d/4 images, 0:0\d so far",
    ):
        assert re.search(f"^{line}", err, re.MULTILINE), (line, err)


def test_a_short_command_says_nothing_of_its_phases(root, base):
    assert run("evaluate", *base, "--data", root, "--workers", "0")[2] == ""


def test_one_domain_is_enough_to_look_at_and_to_test_on_but_not_to_leave_one_out(root, base):
    for domain in DOMAINS[1:]:
        shutil.rmtree(root / domain)
    assert "all" in done("check", root)
    assert list(images(done("evaluate", *base, "--data", root, "--workers", "0"))) == [DOMAINS[0]]
    assert "one domain only" in refused("train", *base, "--data", root)


# --- shards, memory, rates ----------------------------------------------------------------------


def test_images_are_packed_trained_from_and_measured(root, base, tmp_path):
    assert "packed: 20 images in 1 shards" in done("shards", root, tmp_path / "packed")
    assert "is not an empty folder; takes a new one" in refused("shards", root, tmp_path / "packed")
    found = {}
    for source, *how in ((root, "--no-cache-images"), (tmp_path / "packed",)):
        out = tmp_path / f"run-{source.name}"
        told = done("train", *base, "--data", source, "--target", "art", *SHORT, *how, "--out", out)
        assert ("decoded images are kept in memory, about 0.0 MB" in told) == (not how)
        found[source.name] = json.loads((out / "results.json").read_text())["runs"][0]["history"]
    assert found["set"] == found["packed"]
    small = ("--image-size", 16, "--batch", 6, "--batches", 1, "--workers", 0, "--json")
    rows = json.loads(done("bench-data", root, tmp_path / "packed", *small))["rows"]
    assert [row["what"] for row in rows] == ["ImageFolder + DataLoader", "folder", "shards", "memory"]
    assert all(0 < row["low"] <= row["images_per_second"] <= row["high"] for row in rows)


def test_images_that_do_not_fit_are_decoded_anew_and_it_is_said(root, base, tmp_path, monkeypatch):
    assert logs.free_memory() > 10**7
    monkeypatch.setattr(logs, "free_memory", lambda: 1_000)
    code, out, err = run("train", *base, "--data", root, "--target", "art", *SHORT, "--out", tmp_path / "run")
    assert code == 0 and "kept in memory" not in out
    assert "images are decoded anew each time: kept in memory they would take 0.0 MB" in err
