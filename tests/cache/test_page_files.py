"""The files of stored pages: which are written, read and removed, and in what order."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from ktx.cache import disk
from ktx.cache.disk import DiskPageStore
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError

PAGE_BYTES = 2 * 64 * (4 + 8) * 4  # two heads, f32
KEYS = [bytes([i]) * 16 for i in range(9)]
MANY = 1 << 30


def filled_cache(pages=4, heads=2, columns=(4, 8), store=torch.float32):
    """A cache of one layer whose page i holds the number i."""
    cache = PagedCache(LlamaConfig(num_hidden_layers=1), pages, store)
    cache.layers[0].prepare_buffers(heads, columns, torch.float32)
    for buffer in cache.layers[0].buffers:
        for page in range(pages):
            buffer[page] = page
    return cache


@pytest.fixture
def opened(tmp_path):
    stores = []

    def open_store(identity="model", cache=None, max_bytes=MANY, folder=tmp_path):
        stores.append(DiskPageStore(folder, "name", identity, cache or filled_cache(), max_bytes))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def written(store, *keys_and_pages):
    for key, page in keys_and_pages:
        store.put(key, page)
    store.flush()
    store.close()
    return store


def names(store):
    return {entry.name for entry in store.folder.iterdir()}


def name_of(key):
    return key.hex() + ".safetensors"


def test_a_page_is_a_file_named_by_its_hash(opened):
    store = written(opened(), (KEYS[1], 3), (KEYS[2], 1))
    assert names(store) == {name_of(KEYS[1]), name_of(KEYS[2])}
    tensors = load_file(store.folder / name_of(KEYS[1]))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"0.0": (2, 64, 4), "0.1": (2, 64, 8)}
    assert all((tensor == 3).all() for tensor in tensors.values())
    sizes = [path.stat().st_size for path in store.folder.iterdir()]
    assert store.total_bytes == sum(sizes) and min(sizes) > PAGE_BYTES
    assert len(store) == 2 and store.has(KEYS[1]) and not store.has(KEYS[3])


def test_a_stored_page_is_read_into_another(opened):
    written(opened(), (KEYS[1], 3))
    store = opened(cache=(cache := filled_cache()))
    assert store.has(KEYS[1]) and store.fetch(KEYS[1], 0) is True
    for buffer in cache.layers[0].buffers:
        assert buffer[:, 0, 0, 0].tolist() == [3, 1, 2, 3] and (buffer[0] == 3).all()


def test_the_content_is_that_of_the_flush(opened):
    store = opened(cache=(cache := filled_cache()))
    gate, write = threading.Event(), store._write
    store._write = lambda *page: (gate.wait(10), write(*page))
    store.put(KEYS[1], 3)
    cache.layers[0].buffers[0][3] = 7
    store.flush()
    cache.layers[0].buffers[0][3] = 8
    gate.set()
    store.flush()
    store.close()
    assert not store.thread.is_alive() and names(store) == {name_of(KEYS[1])}
    assert (load_file(store.folder / name_of(KEYS[1]))["0.0"] == 7).all()


def test_closing_waits_for_the_last_page(opened):
    store = opened()
    write = store._write
    store._write = lambda *page: (threading.Event().wait(0.2), write(*page))
    written(store, (KEYS[1], 1))
    assert names(store) == {name_of(KEYS[1])} and not store.thread.is_alive()


def test_each_page_is_passed_on_once(opened):
    store = opened()
    store.put(KEYS[1], 1)
    store.flush()
    store.cache.layers[0].buffers[0][1] = 5
    written(store)
    assert (load_file(store.folder / name_of(KEYS[1]))["0.0"] == 1).all()


def test_pages_are_not_stored_while_too_many_bytes_wait(opened, monkeypatch):
    assert disk.MAX_PENDING_BYTES == 268_435_456, "256 MiB"
    monkeypatch.setattr(disk, "MAX_PENDING_BYTES", 2 * PAGE_BYTES)
    store = opened()
    gate, write = threading.Event(), store._write
    store._write = lambda *page: (gate.wait(10), write(*page))
    for i in range(4):
        store.put(KEYS[i], i)
    store.flush()
    gate.set()
    store.close()
    assert names(store) == {name_of(KEYS[0]), name_of(KEYS[1])}, "the third would wait behind two pages"


def test_a_page_is_stored_while_nothing_else_waits(opened, monkeypatch):
    monkeypatch.setattr(disk, "MAX_PENDING_BYTES", 1)
    store = opened()
    for key in KEYS[:2]:
        store.put(key, 1)
        store.flush()
        store.jobs.put(None)
        store.thread.join(10)
        store.thread = threading.Thread(target=store._write_all, daemon=True)
        store.thread.start()
    assert names(store) == {name_of(KEYS[0]), name_of(KEYS[1])}, "the first one is written, so that it waits no longer"


def test_a_page_that_cannot_be_written_is_named_and_skipped(opened, caplog):
    store = opened()
    (store.folder / name_of(KEYS[1])).mkdir()  # a file cannot get this name
    with caplog.at_level(logging.WARNING, "ktx.cache"):
        written(store, (KEYS[1], 1), (KEYS[2], 2))
    assert "a page could not be stored" in caplog.text and str(store.folder) in caplog.text
    assert names(store) == {name_of(KEYS[1]), name_of(KEYS[2])}, "and no part of it is left"
    assert not store.has(KEYS[1]) and store.has(KEYS[2])


def test_a_part_that_cannot_be_begun_is_skipped_for_its_own_reason(opened, caplog, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING, "ktx.cache"):
        store = written(opened(), (KEYS[1], 1))
    assert f"a page could not be stored: {store.folder}: No space left on device" in caplog.text
    assert len(store) == 0 and names(store) == set()


def spoil(file, how):
    tensors = load_file(file)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "gone":
        file.unlink()
    else:
        if how == "shape":
            tensors["0.1"] = tensors["0.1"][:, :, :4].contiguous()
        elif how == "heads":
            tensors["0.1"] = tensors["0.1"][:1].contiguous()
        elif how == "type":
            tensors["0.1"] = tensors["0.1"].half()
        elif how == "fewer":
            del tensors["0.1"]
        else:
            tensors["0.2"] = tensors["0.1"].clone()
        save_file(tensors, file)


@pytest.mark.parametrize("how", ["cut", "gone", "shape", "heads", "type", "fewer", "more"])
def test_a_file_that_does_not_fit_is_removed_and_changes_nothing(opened, caplog, how):
    written(opened(), (KEYS[1], 3), (KEYS[2], 2))
    store = opened(cache=(cache := filled_cache()))
    file = store.folder / name_of(KEYS[1])
    size, before = file.stat().st_size, store.total_bytes
    spoil(file, how)
    with caplog.at_level(logging.WARNING, "ktx.cache"):
        assert store.fetch(KEYS[1], 0) is False
    assert ("cannot be read" in caplog.text) == (how in ("cut", "gone"))
    assert not file.exists() and not store.has(KEYS[1]) and store.total_bytes == before - size
    assert all((buffer[0] == 0).all() for buffer in cache.layers[0].buffers)
    assert store.fetch(KEYS[2], 0) is True


def test_a_page_that_was_never_stored_is_not_found(opened):
    store = opened()
    assert store.fetch(KEYS[1], 0) is False and store.total_bytes == 0


def test_a_page_of_another_process_is_read_without_being_counted(opened):
    store = opened()
    written(opened(), (KEYS[1], 3))
    assert not store.has(KEYS[1]) and store.fetch(KEYS[1], 0) is True
    assert len(store) == 0 and store.total_bytes == 0


def test_a_page_stored_again_counts_once(opened):
    store = written(opened(), (KEYS[1], 3), (KEYS[1], 2))
    file = store.folder / name_of(KEYS[1])
    assert len(store) == 1 and store.total_bytes == file.stat().st_size
    assert (load_file(file)["0.0"] == 2).all()


def file_bytes(opened, folder):
    return written(opened(folder=folder), (KEYS[0], 0)).total_bytes


def test_the_least_recently_used_pages_go_first(opened, tmp_path):
    size = file_bytes(opened, tmp_path / "one")
    store = written(opened(max_bytes=3 * size), *((KEYS[i], 1) for i in range(3)))
    assert set(store.sizes) == set(KEYS[:3]), "the limit is not exceeded"
    os.utime(store.folder / name_of(KEYS[0]), (3, 3))
    os.utime(store.folder / name_of(KEYS[1]), (1, 1))
    os.utime(store.folder / name_of(KEYS[2]), (2, 2))
    store = opened(max_bytes=3 * size)
    assert list(store.sizes) == [KEYS[1], KEYS[2], KEYS[0]] and store.total_bytes == 3 * size
    assert store.fetch(KEYS[1], 0)
    assert list(store.sizes) == [KEYS[2], KEYS[0], KEYS[1]]
    written(store, (KEYS[3], 1))
    assert list(store.sizes) == [KEYS[0], KEYS[1], KEYS[3]] and store.total_bytes == 3 * size
    assert names(store) == {name_of(key) for key in (KEYS[0], KEYS[1], KEYS[3])}
    assert next(iter(opened().sizes)) == KEYS[0], "the next process knows the oldest by its file's time"


def test_the_latest_page_stays_though_it_is_too_large(opened, tmp_path):
    size = file_bytes(opened, tmp_path / "one")
    store = written(opened(max_bytes=size - 1), (KEYS[1], 1), (KEYS[2], 2))
    assert list(store.sizes) == [KEYS[2]] and names(store) == {name_of(KEYS[2])} and store.total_bytes == size


def test_a_page_that_somebody_else_removed_is_dropped(opened, tmp_path):
    size = file_bytes(opened, tmp_path / "one")
    written(opened(max_bytes=size), (KEYS[1], 1))
    store = opened(max_bytes=size)
    (store.folder / name_of(KEYS[1])).unlink()
    written(store, (KEYS[2], 2))
    assert list(store.sizes) == [KEYS[2]] and store.total_bytes == size


def test_only_pages_are_found_and_parts_are_removed(opened):
    store = written(opened(), (KEYS[1], 1))
    others = ["notes.txt", "0" * 31 + ".safetensors", "G" * 32 + ".safetensors"]
    for name in (*others, KEYS[2].hex() + ".99.part"):
        (store.folder / name).write_bytes(b"")
    (store.folder / "folder.part").mkdir()
    assert list(opened().sizes) == [KEYS[1]]
    assert names(store) == {name_of(KEYS[1]), "folder.part", *others}


def test_another_process_may_remove_a_part_first(opened, monkeypatch):
    part = opened().folder / (KEYS[2].hex() + ".99.part")
    part.write_bytes(b"")
    access = os.access
    monkeypatch.setattr(os, "access", lambda *args: (part.unlink(), access(*args))[1])
    assert list(opened().sizes) == []


def test_a_process_can_end_without_closing(opened):
    assert opened().thread.daemon


def test_the_folder_is_named_by_what_determines_a_page(opened, tmp_path):
    store = opened({"a": 1, "b": 2})
    assert store.folder.parent == tmp_path and len(store.folder.name) == len("name-") + 16
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert opened({"b": 2, "a": 1}).folder == store.folder
    assert opened({"a": 1, "b": 2}, filled_cache(pages=2)).folder == store.folder, "how many pages fit is not content"
    others = [
        opened({"a": 1, "b": 3}).folder,
        opened({"a": 1, "b": 2}, filled_cache(heads=1)).folder,
        opened({"a": 1, "b": 2}, filled_cache(columns=(4, 4))).folder,
        opened({"a": 1, "b": 2}, filled_cache(store=torch.float16)).folder,
    ]
    assert len({store.folder, *others}) == 5


def test_an_identity_may_have_values_that_json_does_not_know(opened):
    assert opened({"type": torch.float16}).folder != opened({"type": torch.bfloat16}).folder


def test_a_folder_is_created_with_its_parents(opened, tmp_path):
    store = opened(folder=tmp_path / "a" / "b")
    assert store.folder.parent == tmp_path / "a" / "b" and store.folder.is_dir()


def test_a_folder_that_cannot_be_used_is_named(opened, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"prefix_cache_dir {tmp_path / 'file'}: cannot be used: Not a directory"):
        opened(folder=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    with pytest.raises(UsageError, match="cannot be written"):
        opened()
