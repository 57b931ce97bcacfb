"""fastheads.train.data.sampling: the split, and batches balanced over domains, on any number of processes."""

import numpy as np
import pytest
from pictures import write_image

from fastheads.train.data.domains import read_domains
from fastheads.train.data.sampling import BalancedBatches, split


def test_split_is_disjoint_complete_and_a_fifth_held_out(folders):
    for domain, held_out in (("art", 1), ("photo", 2), ("sketch", 1)):  # of 6, 10 and 4
        train, validation = split(folders, domain)
        count = len(folders.files[folders.index(domain)])
        assert sorted(train + validation) == list(range(count))
        assert len(validation) == held_out
    assert len(split(folders, "photo", holdout=0.5)[1]) == 5
    assert len(split(folders, "sketch", holdout=0.99)[0]) == 1


def test_split_of_a_seed_never_changes(folders):
    # Written down once: another split would put validation images into runs that resume.
    assert split(folders, "photo", seed=0)[1] == [3, 6]
    assert split(folders, "photo", seed=np.int64(0))[1] == [3, 6]
    assert split(folders, "photo", seed=1)[1] == [2, 7]


def test_batches_of_a_seed_never_change():
    batch = BalancedBatches({0: range(4), 2: range(4)}, 2, 2, seed=5).batch(1)
    assert [key[:2] for key in batch] == [(0, 2), (0, 0), (2, 3), (2, 1)]
    assert batch[0][2] == 8365929630057263191
    same = BalancedBatches({2: range(4), np.int64(0): range(4)}, 2, 2, seed=np.int64(5))
    assert same.batch(1) == batch


def test_split_does_not_depend_on_the_other_domains(root, folders):
    alone = read_domains(root, domains=["photo", "sketch"])
    for seed in range(5):
        assert split(alone, "photo", seed=seed) == split(folders, "photo", seed=seed)


def test_two_domains_of_a_size_are_split_differently(root):
    for i in range(40):
        write_image(root / "art" / "dog" / f"more{i}.png", size=(1, 1))
        write_image(root / "photo" / "dog" / f"more{i}.png", size=(1, 1))
    for i in range(4):
        write_image(root / "art" / "cat" / f"more{i}.png", size=(1, 1))
    folders = read_domains(root)
    assert len(folders.files[0]) == len(folders.files[1])
    assert split(folders, "art") != split(folders, "photo")


@pytest.fixture
def objects(tmp_path):
    """Two classes; five pictures of each of four dogs, of one cat, and two cats that have no folder of their own."""
    for domain in ("art", "photo"):
        for at in range(4):
            for i in range(5):
                write_image(tmp_path / domain / "dog" / f"dog{at}" / f"{i}.png", size=(1, 1))
        for i in range(5):
            write_image(tmp_path / domain / "cat" / "felix" / f"{i}.png", size=(1, 1))
        for i in range(2):
            write_image(tmp_path / domain / "cat" / f"{i}.png", size=(1, 1))
    return read_domains(tmp_path)


def test_split_by_folder_keeps_folders_whole_and_every_class_in_training(objects):
    paths = [path for path, _ in objects.files[0]]
    seen = set()
    for seed in range(20):
        train, validation = split(objects, "art", seed=seed, by="folder")
        assert sorted(train + validation) == list(range(27)) and 1 <= len(validation) <= 5
        folders = [{paths[i].parent.name for i in part} - {"cat"} for part in (train, validation)]
        assert folders[0].isdisjoint(folders[1])
        assert {objects.files[0][i][1] for i in train} == {0, 1}
        seen.add(tuple(validation))
    assert len(seen) > 5
    assert split(objects, "art", by="folder") == split(objects, "art", by="folder")
    assert any(len({paths[i].parent.name for i in split(objects, "art", seed=s)[1]}) > 1 for s in range(3))


def test_split_by_folder_needs_two_folders_of_a_class(folders):
    with pytest.raises(ValueError, match="by: got 'class'; takes 'image' or 'folder'"):
        split(folders, "art", by="class")


@pytest.mark.parametrize("per_domain", [1, 3, 7, 12])
def test_every_image_comes_once_before_any_comes_again(per_domain):
    indices = {0: [0, 2, 3, 5, 9], 2: list(range(7))}
    keys = [k for batch in BalancedBatches(indices, per_domain, 35, seed=3) for k in batch]
    for domain, files in indices.items():
        drawn = [file for d, file, _ in keys if d == domain]
        epochs = [drawn[i : i + len(files)] for i in range(0, len(drawn), len(files))]
        assert all(sorted(epoch) == files for epoch in epochs)
        if len(epochs) > 6:
            assert len({tuple(epoch) for epoch in epochs}) > 3  # shuffled anew each time


def test_seeds_and_domains_are_shuffled_and_augmented_apart():
    def drawn(seed, domain):
        batch = BalancedBatches({0: range(50), 1: range(50)}, 50, 1, seed=seed).batch(0)
        return [key[1:] for key in batch if key[0] == domain]

    runs = [drawn(seed, domain) for seed in (0, 1, 2**40) for domain in (0, 1)]
    assert len({tuple(file for file, _ in run) for run in runs}) == 6
    assert len({seed for run in runs for _, seed in run}) == 300


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
@pytest.mark.parametrize("start", [0, 5])
def test_processes_share_the_batches_of_one_and_resume_on_any_number(processes, start):
    indices = {0: [0, 2, 3, 5, 9], 2: list(range(7))}
    alone = [BalancedBatches(indices, 7, 12, seed=3).batch(step) for step in range(start, 12)]
    shares = [
        BalancedBatches(indices, 7, 12, seed=3, start=start, process=process, processes=processes)
        for process in range(processes)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        for domain in indices:
            own = [[key for key in part if key[0] == domain] for part in parts]
            assert [len(part) for part in own] == [len(range(process, 7, processes)) for process in range(processes)]
            together = [own[i % processes][i // processes] for i in range(7)]
            assert together == [key for key in whole if key[0] == domain]
        assert [len(part) for part in parts] == [share.batch_size for share in shares]
